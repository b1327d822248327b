"""Walk through a model block by block and see what every group of linears reads.

The generator hands out one site at a time; the caller replaces the site's linears, and everything
after it then sees the error that was made. Beside this quantized stream runs the float stream,
so that a site knows both what its linears get and what they should have got.

A block that follows the one before it reads what that one gives. For any other the whole model is
run up to it, quantized as far as it is, and so is a float copy.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from qtk import ranks
from qtk.errors import CalibrationError, ModelError
from qtk.models import Block, Group
from qtk.observe.guard import reading
from qtk.observe.probe import Gradients, Probe, parts_of
from qtk.observe.site import Batch, Keeper, Layer, Site, linears_of
from qtk.windows import Windows, drawn

MAX_TOKENS = 16384  # rows kept of one site for searches; extremes are taken over all tokens


T = TypeVar("T")
Rows = dict[str, dict[int, Tensor]]  # [T, K] by group and batch
Read = tuple[Tensor | None, Tensor, Tensor, Tensor]  # [B, T, K] if kept, mask, lowest, highest [K]


class Gather(Protocol):
    """Does the work on every rank, and gives all results by rank."""

    def __call__(self, work: Callable[[], T]) -> list[T]: ...


@dataclass
class Call:
    """One batch on its way through the blocks.

    Attributes:
        index: of the batch among those of all ranks.
        hidden, float_hidden: [B, T, H], or whatever the block reads, of both streams.
        mask: [B, T] bool, False at padding; None where the block reads no tokens.
        kept: whether its rows are among those that sites show.
        share: rows of each sample that a site shows, where there is no mask.
    """

    index: int
    hidden: Tensor
    float_hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mask: Tensor | None
    kept: bool = True
    share: int = MAX_TOKENS

    @property
    def size(self) -> int:
        """Tokens that are no padding, or samples."""
        return len(self.hidden) if self.mask is None else int(self.mask.sum())

    def seen(self, x: Tensor) -> Tensor:
        """Of [B, T, C] the tokens that count; all of what has none."""
        return x if self.mask is None else x[self.mask]

    def rows(self, layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """What a layer reads, as rows [B, T, K], and which of them count, [B, T] bool.

        Without a mask they are `share` of each sample's windows, or places, the same in both
        streams.
        """
        if self.mask is not None:
            return x.reshape(*self.mask.shape, -1), self.mask
        if isinstance(layer, nn.Conv2d):
            x = Windows.of(layer).rows(x, self.share, self.index)
        else:
            x = x.reshape(len(x), -1, x.shape[-1])
            x = x[:, drawn(x.shape[1], self.share, self.index).to(x.device)]
        return x, torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)


class _Stop(Exception):
    """Ends a forward pass once what it was run for has been seen."""


@torch.no_grad()
def walk(
    model: nn.Module,
    blocks: Sequence[Block],
    batches: Sequence[Batch],
    max_tokens: int = MAX_TOKENS,
    gradients: Gradients | None = None,
    keeper: Keeper | None = None,
    shared: bool = True,
    curvatures: Callable[[nn.Module], dict[str, Tensor]] | None = None,
) -> Iterator[Site]:
    """Yields every site of every block that is not finished yet, in the order of computation.

    `keeper` sees each block before it is looked at, and once all its sites are replaced, with the
    quantized stream before it (`hidden`) and the float stream after it (`float_hidden`).

    Where several ranks quantize together, each runs its share of the batches, unless `shared` is
    False; every rank's sites show the rows of all.

    `curvatures` is asked about the float copy of a model whose blocks do not follow each other,
    once, and only if somebody asks a site for them.

    The memory held is one block's inputs (twice), one float copy of the block, or of the model
    where blocks do not follow each other, and at most `max_tokens` rows of each of its sites.

    Raises:
        CalibrationError: a batch that the model cannot read, or a block that gives nan or inf.
    """
    gather = ranks.together if shared else _alone
    mine = range(ranks.rank(), len(batches), ranks.world()) if shared else range(len(batches))
    enter = partial(_entered, gather, model, batches, mine, max_tokens)
    twin = None if all(block.follows for block in blocks) else copy.deepcopy(model)
    curved = None if twin is None or curvatures is None else cache(partial(curvatures, twin))
    calls = enter(blocks[0], twin) if blocks[0].follows else []
    for index, block in enumerate(blocks):
        if keeper is not None:
            keeper.bring(block)
        module = model.get_submodule(block.name)
        floats = copy.deepcopy(module) if twin is None else twin.get_submodule(block.name)
        restored = keeper is not None and keeper.restored(index, block)
        if not block.follows:
            if restored:
                continue
            calls = enter(block, twin)
        seen = gather(partial(_run_float, floats, block, calls, restored))
        del floats
        for group in () if restored else block.groups:
            site = _observe(model, module, block, group, calls, seen, gather)
            site = replace(site, curvatures=curved)
            if gradients is not None:
                parts = parts_of(calls, [x for x, _ in site.sequences])
                weights = {n: m.weight.detach().float() for n, m in site.linears.items()}
                site = replace(site, probe=Probe(module, block, weights, parts, gradients))
            yield site
        if keeper is not None and not restored:
            keeper.done(index, block, calls)
        if block.follows:
            gather(partial(_run_quantized, module, block, calls))
        if keeper is not None:
            keeper.release(block)


def _entered(
    gather: Gather, model: nn.Module, batches: Sequence[Batch], mine: Sequence[int],
    max_tokens: int, block: Block, twin: nn.Module | None,
) -> list[Call]:  # fmt: skip
    """What a block is called with in the quantized model, and in its float twin if there is one."""

    def calls() -> list[Call]:
        found = _first_calls(model, block, batches, mine)
        if twin is not None:
            for call, other in zip(found, _first_calls(twin, block, batches, mine), strict=True):
                call.float_hidden = other.hidden
        return found

    return _kept(gather, calls, max_tokens)


def _alone(work: Callable[[], T]) -> list[T]:
    """`ranks.together` where every rank does everything."""
    return [work()]


def _kept(gather: Gather, work: Callable[[], list[Call]], max_tokens: int) -> list[Call]:
    """This rank's calls, marked where their rows are among the first `max_tokens` of all ranks.

    Without tokens every sample gives a share of the rows.
    """
    calls: list[Call] = []

    def sizes() -> dict[int, int]:
        calls[:] = work()
        return {call.index: call.size for call in calls}

    every = {index: size for part in gather(sizes) for index, size in part.items()}
    before = {i: sum(size for j, size in every.items() if j < i) for i in every}
    for call in calls:
        call.kept = call.mask is None or before[call.index] < max_tokens
        call.share = max(1, max_tokens // max(1, sum(every.values())))
    return calls


def _run_quantized(module: nn.Module, block: Block, calls: list[Call]) -> None:
    """Moves the quantized stream over the block."""
    for call in calls:
        call.hidden = run(module, call.hidden, call)
        _check_finite(call.hidden, call, f"{block.name}, quantized,")


def _first_calls(
    model: nn.Module, block: Block, batches: Sequence[Batch], mine: Sequence[int]
) -> list[Call]:
    """Runs the model up to its first block and keeps what that block was called with."""
    calls: list[Call] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        index = mine[len(calls)]
        hidden, *rest = args if args else (kwargs.pop(_first_of(kwargs)),)
        if not isinstance(hidden, Tensor):
            raise ModelError(
                f"{block.name} reads a {type(hidden).__name__} first, and a block must read a "
                "tensor: name smaller blocks with blocks="
            )
        if not torch.isfinite(hidden).all():
            raise CalibrationError(
                f"batch {index} gives nan or inf at the input of {block.name}: "
                "check the calibration data and the model's embeddings"
            )
        mask = _mask_of(batches[index], hidden) if block.follows else None
        calls.append(Call(index, hidden, hidden, tuple(rest), kwargs, mask))
        raise _Stop

    handle = model.get_submodule(block.name).register_forward_pre_hook(stop, with_kwargs=True)
    try:
        for index in mine:
            extra = {"use_cache": False} if block.causal else {}
            try:
                forward(model, batches[index], index, **extra)
            except _Stop:
                continue
            raise CalibrationError(f"the model never reached {block.name} on a calibration batch")
    finally:
        handle.remove()
    return calls


def _first_of(kwargs: dict[str, Any]) -> str:
    return "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))


def _mask_of(batch: Batch, hidden: Tensor) -> Tensor:
    """[B, T] bool of tokens [B, T, H]: all, where the batch does not say."""
    mask = batch.get("attention_mask")
    if mask is not None and mask.dim() == 3:  # of [B, choices, T], which the model flattens
        mask = mask.flatten(0, 1)
    if mask is None or tuple(mask.shape) != tuple(hidden.shape[:2]):
        mask = torch.ones(hidden.shape[:2])
    return mask.bool().to(hidden.device)


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


def _run_float(module: nn.Module, block: Block, calls: list[Call], only_run: bool = False) -> Rows:
    """Moves the float stream over the block; returns the float rows of each group and batch."""
    rows: Rows = {group.name: {} for group in block.groups}
    handles = []
    current: list[Call] = []
    passed: set[str] = set()  # a linear may read something else afterwards: positions, for one
    for group in () if only_run else block.groups:

        def keep(layer: nn.Module, args: tuple[Tensor, ...], name: str = group.name) -> None:
            call = current[0]
            first = name not in passed
            passed.add(name)
            if first and call.kept and shows_rows(layer):
                x, mask = call.rows(layer, args[0])
                rows[name][call.index] = x[mask].float()

        linear = module.get_submodule(block.inside(group.linears[0]))
        handles.append(linear.register_forward_pre_hook(keep))
    for call in calls:
        current[:] = [call]
        passed.clear()
        with reading(f"calibration batch {call.index}"):  # a mask of another shape shows only here
            call.float_hidden = run(module, call.float_hidden, call)
        _check_finite(call.float_hidden, call, f"{block.name}, in floating point,")
    for handle in handles:
        handle.remove()
    return rows


def _observe(
    model: nn.Module, module: nn.Module, block: Block, group: Group, calls: list[Call],
    floats: list[Rows], gather: Gather,
) -> Site:  # fmt: skip
    """The group's site, from the rows of all ranks."""
    linears = linears_of(model, group)
    if not all(shows_rows(linear) for linear in linears.values()):
        for part in floats:
            part.pop(group.name)
        return Site(block, group, linears)
    seen = gather(partial(_read_by, linears[group.linears[0]], module, calls))
    every = [found for _, found in sorted(item for part in seen for item in part.items())]
    rows = dict(item for part in floats for item in part.pop(group.name).items())
    sequences = [(x, mask) for x, mask, *_ in every if x is not None]
    lo, hi = torch.stack([low for *_, low, _ in every]), torch.stack([high for *_, high in every])
    return Site(
        block, group, linears, sequences, torch.cat([rows[i] for i in sorted(rows)]), lo, hi
    )


def shows_rows(layer: Layer | nn.Module) -> bool:
    """Whether all its filters read the same numbers; those of a grouped convolution do not."""
    return not isinstance(layer, nn.Conv2d) or layer.groups == 1


def _read_by(linear: nn.Module, module: nn.Module, calls: list[Call]) -> dict[int, Read]:
    """Runs the block on the quantized stream until a linear is reached; what it reads, by batch."""
    found: dict[int, Read] = {}
    current: list[Call] = []

    def stop(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        call = current[0]
        x, mask = call.rows(linear, args[0])
        x = x.float()
        rows = x[mask]
        found[call.index] = (x if call.kept else None, mask, rows.amin(0), rows.amax(0))
        raise _Stop

    handle = linear.register_forward_pre_hook(stop)
    try:
        for call in calls:
            current[:] = [call]
            try:
                run(module, call.hidden, call)
            except _Stop:
                continue
    finally:
        handle.remove()
    return found


def _check_finite(hidden: Tensor, call: Call, what: str) -> None:
    if not torch.isfinite(call.seen(hidden)).all():
        raise CalibrationError(
            f"{what} gives nan or inf on calibration batch {call.index}: it overflows; look for "
            "huge weights or biases, or load the model in a wider dtype"
        )
