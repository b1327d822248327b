"""Walk through a model block by block and see what every group of linears reads.

The generator hands out one site at a time; the caller replaces the site's linears, and everything
after it then sees the error that was made. Beside this quantized stream runs the float stream,
so that a site knows both what its linears get and what they should have got.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qtk.errors import CalibrationError
from qtk.models import Block, Group
from qtk.observe.guard import reading
from qtk.observe.probe import Gradients, Probe, parts_of
from qtk.observe.site import Batch, Site, linears_of

MAX_TOKENS = 16384  # rows kept of one site for searches; extremes are taken over all tokens


@dataclass
class Call:
    """One batch on its way through the blocks."""

    hidden: Tensor  # [B, T, H], quantized stream
    float_hidden: Tensor  # [B, T, H], float stream
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mask: Tensor  # [B, T] bool, False at padding


class _Stop(Exception):
    """Ends a forward pass once what it was run for has been seen."""


@torch.no_grad()
def walk(
    model: nn.Module,
    blocks: Sequence[Block],
    batches: Sequence[Batch],
    max_tokens: int = MAX_TOKENS,
    gradients: Gradients | None = None,
    after_block: Callable[[nn.Module, Sequence[Call]], None] | None = None,
) -> Iterator[Site]:
    """Yields every site of every block, in the order of computation.

    `after_block` sees each block once all its sites are replaced, with the quantized stream before
    it (`hidden`) and the float stream after it (`float_hidden`).

    The memory held is one block's inputs (twice), one float copy of the block, and at most
    `max_tokens` rows of each of its sites.

    Raises:
        CalibrationError: a batch that the model cannot read, or a block that gives nan or inf.
    """
    calls = _first_calls(model, blocks[0], batches)
    for block in blocks:
        module = model.get_submodule(block.name)
        seen = _run_float(copy.deepcopy(module), block, calls, max_tokens)
        for group in block.groups:
            site = _observe(model, module, block, group, calls, seen.pop(group.name), max_tokens)
            if gradients is not None:
                parts = parts_of(calls, [x for x, _ in site.sequences])
                weights = {n: m.weight.detach().float() for n, m in site.linears.items()}
                site = replace(site, probe=Probe(module, block, weights, parts, gradients))
            yield site
        if after_block is not None:
            after_block(module, calls)
        for i, call in enumerate(calls):
            call.hidden = run(module, call.hidden, call)
            _check_finite(call.hidden, call, f"{block.name}, quantized,", i)


def _first_calls(model: nn.Module, block: Block, batches: Sequence[Batch]) -> list[Call]:
    """Runs the model up to its first block and keeps what that block was called with."""
    calls: list[Call] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, *rest = args if args else (kwargs.pop("hidden_states"),)
        if not torch.isfinite(hidden).all():
            raise CalibrationError(
                f"batch {len(calls)} gives nan or inf at the input of {block.name}: "
                "check the calibration data and the model's embeddings"
            )
        mask = batches[len(calls)].get("attention_mask")
        if mask is not None and mask.dim() == 3:  # of [B, choices, T], which the model flattens
            mask = mask.flatten(0, 1)
        if mask is None or tuple(mask.shape) != tuple(hidden.shape[:2]):
            mask = torch.ones(hidden.shape[:2])
        mask = mask.bool().to(hidden.device)
        calls.append(Call(hidden, hidden, tuple(rest), kwargs, mask))
        raise _Stop

    handle = model.get_submodule(block.name).register_forward_pre_hook(stop, with_kwargs=True)
    try:
        for batch in batches:
            extra = {"use_cache": False} if block.causal else {}
            try:
                forward(model, batch, len(calls), **extra)
            except _Stop:
                continue
            raise CalibrationError(f"the model never reached {block.name} on a calibration batch")
    finally:
        handle.remove()
    return calls


def forward(model: nn.Module, batch: Batch, index: int, **options: Any) -> Any:
    """The model's output for one batch.

    Raises:
        CalibrationError: the model cannot read it; the message has its number.
    """
    with reading(f"calibration batch {index}"):
        return model(**batch, **options)


def run(module: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    """A block's output [B, T, H], called as the model called it."""
    out = module(hidden, *call.args, **call.kwargs)
    return out if isinstance(out, Tensor) else out[0]


def _run_float(
    module: nn.Module, block: Block, calls: list[Call], max_tokens: int
) -> dict[str, Tensor]:
    """Moves the float stream over the block; returns the float rows of each group."""
    rows: dict[str, list[Tensor]] = {group.name: [] for group in block.groups}
    handles = []
    current: list[Call] = []
    passed: set[str] = set()  # a linear may read something else afterwards: positions, for one
    for group in block.groups:

        def keep(_: nn.Module, args: tuple[Tensor, ...], name: str = group.name) -> None:
            mask = current[0].mask
            first = name not in passed
            passed.add(name)
            if first and sum(map(len, rows[name])) < max_tokens:
                rows[name].append(args[0].reshape(*mask.shape, -1)[mask].float())

        linear = module.get_submodule(group.linears[0].removeprefix(f"{block.name}."))
        handles.append(linear.register_forward_pre_hook(keep))
    for i, call in enumerate(calls):
        current[:] = [call]
        passed.clear()
        with reading(f"calibration batch {i}"):  # a mask of another shape shows only here
            call.float_hidden = run(module, call.float_hidden, call)
        _check_finite(call.float_hidden, call, f"{block.name}, in floating point,", i)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in rows.items()}


def _observe(
    model: nn.Module, module: nn.Module, block: Block, group: Group, calls: list[Call],
    float_rows: Tensor, max_tokens: int,
) -> Site:  # fmt: skip
    """Runs the block on the quantized stream until the group's linears are reached."""
    linears = linears_of(model, group)
    sequences: list[tuple[Tensor, Tensor]] = []
    lo: list[Tensor] = []
    hi: list[Tensor] = []
    current: list[Call] = []
    kept = 0

    def stop(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal kept
        mask = current[0].mask
        x = args[0].reshape(*mask.shape, -1).float()
        rows = x[mask]
        lo.append(rows.amin(0))
        hi.append(rows.amax(0))
        if kept < max_tokens:
            sequences.append((x, mask))
            kept += len(rows)
        raise _Stop

    handle = linears[group.linears[0]].register_forward_pre_hook(stop)
    try:
        for call in calls:
            current[:] = [call]
            try:
                run(module, call.hidden, call)
            except _Stop:
                continue
    finally:
        handle.remove()
    return Site(block, group, linears, sequences, float_rows, torch.stack(lo), torch.stack(hi))


def _check_finite(hidden: Tensor, call: Call, what: str, index: int) -> None:
    if not torch.isfinite(hidden[call.mask]).all():
        raise CalibrationError(
            f"{what} gives nan or inf on calibration batch {index}: it overflows; look for huge "
            "weights or biases, or load the model in a wider dtype"
        )
