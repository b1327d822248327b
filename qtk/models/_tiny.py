"""Random models that run in milliseconds, and one batch for each."""

from typing import Any

import torch
import transformers
from torch import nn

Tiny = tuple[nn.Module, dict[str, Any]]

SIZES: dict[str, Any] = {
    "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64,
}  # fmt: skip
TEXT = {"vocab_size": 99, "max_position_embeddings": 64}
IMAGE = {"image_size": 16, "patch_size": 4}


def text(model_class: str, **sizes: Any) -> Tiny:
    """A model of tokens and two sentences, the second padded.

    Args:
        model_class: a class of transformers.
        sizes: fields of its config that are not as usual.
    """
    model = _build(model_class, {**TEXT, **sizes})
    ids = torch.randint(3, 99, (2, 8))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    ids[mask == 0] = int(getattr(model.config, "pad_token_id", None) or 0)
    return model, {"input_ids": ids, "attention_mask": mask}


def image(model_class: str, **sizes: Any) -> Tiny:
    """A model of images and two of them, 16 pixels wide; arguments as `text`."""
    model = _build(model_class, {**IMAGE, **sizes})
    return model, {"pixel_values": torch.randn(2, 3, 16, 16)}


def _build(model_class: str, sizes: dict[str, Any]) -> Any:
    cls = getattr(transformers, model_class)
    return cls(cls.config_class(**{**SIZES, **sizes})).eval()
