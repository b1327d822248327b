"""What a runtime makes of a file, beside what the quantized model does."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from qtk import tracing
from qtk.assembly import quantized_attentions, quantized_layers, run_on
from qtk.errors import ModelError
from qtk.formats import Exported, Source
from qtk.modules.conv import QuantConv2d
from qtk.modules.floats import restore_attention

SHAPES = ((3, 13), (1, 5))  # sentences and tokens of the random batches: not those traced
LEAST = 0.98  # mean cosine: codes that fall differently cost thousandths, a wrong file much more

Run = Callable[[dict[str, Tensor]], dict[str, Any]]  # a batch to the outputs by name


def compared(source: Source, run: Run, **told: Any) -> Exported:
    """An `Exported` with what the comparison found.

    Rows are tokens or images of the model's first output, padding left out.

    Raises:
        ModelError: what was written computes something else.
    """
    cosines, largest = [], 0.0
    model = reference(source.model)
    for batch in source.batches or _random(source.model):
        wanted, found = _rows(model, batch), _found(run, model, batch)
        cosines.append(torch.cosine_similarity(found, wanted, dim=-1))
        largest = max(largest, float((found - wanted).abs().max()))
    every = torch.cat(cosines)
    result = Exported(
        cosine=float(every.mean()), worst=float(every.min()), largest_difference=largest, **told
    )
    if not result.cosine >= LEAST:
        raise ModelError(
            f"the {result.format} file computes something else: cosine {result.cosine:.4f}, "
            f"largest difference {largest:.3g} in {result.checked_in}; this is a defect of qtk or "
            "of that runtime"
        )
    return result


def reference(model: Any) -> Any:
    """The model that a file is held to.

    Attention is in floating point, as it is in the file; layers of weights alone compute what they
    are defined as, and not in bfloat16, as a CPU does for few tokens.
    """
    alone = any(layer.scheme.a is None for layer in quantized_layers(model).values())
    if not (alone or quantized_attentions(model)):
        return model
    model = copy.deepcopy(model)
    restore_attention(model)
    if alone:
        run_on(model, "reference")
    return model


def needs_float_attention(model: Any) -> tuple[str, ...]:
    """A note where the file's attention is not the model's."""
    told = "attention is in floating point; qtk computes its products in integers"
    return (told,) if quantized_attentions(model) else ()


def needs_float_patches(model: Any) -> tuple[str, ...]:
    """A note where the file's patch embedding is not the model's."""
    told = "the patch embedding is a float convolution, with the weights of its codes"
    return (told,) if any(isinstance(m, QuantConv2d) for m in model.modules()) else ()


def saturates() -> bool:
    """Whether this CPU adds pairs of u8 x s8 products in 16 bits, as x86 does without VNNI."""
    found = torch.cpu.get_capabilities()
    exact = ("avx512_vnni", "avx_vnni", "amx_int8")
    return found.get("architecture") == "x86_64" and not any(found.get(name) for name in exact)


def _random(model: Any) -> Iterator[dict[str, Tensor]]:
    for seed, (rows, tokens) in enumerate(SHAPES, 1):
        yield tracing.example(model, rows, tokens, seed)


@torch.no_grad()
def _rows(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """[rows, features] float32 of the first output."""
    device = next(model.parameters()).device
    out = model(**{name: value.to(device) for name, value in batch.items()}, return_dict=True)
    return _flat(next(v for v in out.values() if isinstance(v, Tensor)).float().cpu(), batch)


def _found(run: Run, model: Any, batch: dict[str, Tensor]) -> Tensor:
    served = tracing.completed(model, batch)
    outputs = run({name: value.cpu() for name, value in served.items()})
    return _flat(torch.from_numpy(next(iter(outputs.values()))), batch)


def _flat(y: Tensor, batch: dict[str, Tensor]) -> Tensor:
    mask = batch.get("attention_mask")
    if mask is not None and y.shape[: mask.dim()] == mask.shape and y.dim() > mask.dim():
        return y[mask.bool().cpu()]
    return y.reshape(-1, y.shape[-1])
