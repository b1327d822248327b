"""Which layers should keep more bits: those whose rounding, alone, shows most in the output."""

import copy
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from qtk.errors import SchemeError
from qtk.learn.objective import output_error
from qtk.models import Block
from qtk.observe import Batch, Site, forward, walk

SHARE = 0.1  # of the weights in the blocks that bits="auto" keeps at eight bits, at most
KEPT_BITS = 8
PROBES = 2  # batches that the output is compared on


def share_of(bits: str) -> float:
    """ "auto" or "auto:0.2" -> the share of the weights that may keep eight bits.

    Raises:
        SchemeError: anything else.
    """
    word, _, number = bits.partition(":")
    try:
        share = float(number) if number else SHARE
    except ValueError:
        share = -1.0
    if word != "auto" or not 0 < share < 1:
        raise SchemeError(f"bits={bits!r}: give 'auto', 'auto:0.2' for a share, or a dict")
    return share


@torch.no_grad()
def sensitive(
    model: nn.Module, blocks: Sequence[Block], batches: Sequence[Batch],
    quantized: Callable[[Site], Iterable[tuple[str, nn.Module]]], share: float,
) -> tuple[str, ...]:  # fmt: skip
    """Names of linears, by whole groups that read one input.

    Each group is quantized alone in a float model; those with the largest error of the model's
    output a weight are taken, as many as fit.

    Args:
        quantized: the integer linears of a site, by name.
        share: of the weights in the blocks, at most.
    """
    student = copy.deepcopy(model).eval()
    chosen_batches = range(0, len(batches), max(len(batches) // PROBES, 1))[:PROBES]
    probes = [batches[i] for i in chosen_batches]
    wanted = [forward(model, batches[i], i) for i in chosen_batches]
    found: list[tuple[float, int, tuple[str, ...]]] = []  # error a weight, weights, names
    for site in walk(student, blocks, batches):
        for name, layer in quantized(site):
            student.set_submodule(name, layer)
        error = sum(
            float(output_error(student(**batch), output, batch.get("attention_mask")))
            for batch, output in zip(probes, wanted, strict=True)
        )
        for name, linear in site.linears.items():
            student.set_submodule(name, linear)
        size = sum(linear.weight.numel() for linear in site.linears.values())
        found.append((error / size, size, tuple(site.linears)))
    left = share * sum(size for _, size, _ in found)
    chosen: list[str] = []
    for _, size, names in sorted(found, reverse=True):
        if size <= left:
            left -= size
            chosen += names
    return tuple(chosen)
