"""What a tracer needs of a transformers model: example inputs, positional arguments, quiet."""

import logging
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qtk.observe.tokens import reads_choices

ROWS, TOKENS = 2, 8  # of the batch that is traced; both axes are dynamic


class Named(nn.Module):
    """A model with positional inputs, and those outputs that are tensors as a tuple."""

    def __init__(self, model: nn.Module, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.inputs, self.outputs = model, inputs, outputs

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        found = self.model(**dict(zip(self.inputs, args, strict=True)), return_dict=True)
        return tuple(found[name] for name in self.outputs)


@torch.no_grad()
def output_names(model: Any, batch: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The model's outputs that are tensors, in order."""
    found = model(**batch, return_dict=True)
    return tuple(name for name, value in found.items() if isinstance(value, Tensor))


def example(model: Any, rows: int = ROWS, tokens: int = TOKENS, seed: int = 0) -> dict[str, Tensor]:
    """A batch of random tokens or pixels with all inputs that a served model reads.

    The last row of tokens is padded, where there are several.
    """
    config, generator = model.config, torch.Generator().manual_seed(seed)
    if getattr(model, "main_input_name", "input_ids") == "pixel_values":
        size = config.image_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        shape = (rows, config.num_channels, height, width)
        return {"pixel_values": torch.randn(shape, generator=generator)}
    ids = torch.randint(3, config.vocab_size, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    if rows > 1:
        mask[-1, tokens - tokens // 3 :] = 0
        ids[mask == 0] = int(getattr(config, "pad_token_id", None) or 0)
    batch = completed(model, {"input_ids": ids, "attention_mask": mask})
    if reads_choices(model):
        batch = {name: value[:, None].expand(-1, 2, -1) for name, value in batch.items()}
    return batch


def completed(model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch with all inputs that the file has: the token types that BERT takes for zeros."""
    ids = batch.get("input_ids")
    if ids is None or getattr(model.config, "type_vocab_size", 0) < 2:
        return dict(batch)
    return {"token_type_ids": torch.zeros_like(ids), **batch}


def dynamic_axes(name: str, value: Tensor) -> dict[int, Any]:
    """Of one input: rows of images, all axes of tokens."""
    dynamic = torch.export.Dim.DYNAMIC
    return {0: dynamic} if name == "pixel_values" else dict.fromkeys(range(value.dim()), dynamic)


class Quietly(warnings.catch_warnings):
    """Without the exporter's remarks on its own progress."""

    def __enter__(self) -> Any:
        self._disabled = logging.root.manager.disable
        logging.disable(max(self._disabled, logging.WARNING))
        found = super().__enter__()
        warnings.simplefilter("ignore")
        return found

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        logging.disable(self._disabled)
