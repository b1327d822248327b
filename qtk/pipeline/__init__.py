"""run(): the whole method on one page, read from top to bottom."""

import copy
import logging
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qtk import ranks
from qtk.assembly import base_name, check_float, finish
from qtk.errors import ModelError
from qtk.integrations.transformers import attach, load_float, refuse_saving
from qtk.integrity import checksum, fingerprint
from qtk.models import Block, describe, fold_scales
from qtk.modules.base import resolve_backend
from qtk.observe import Batch, Site, imagine, walk
from qtk.observe.batches import prepare
from qtk.observe.gradients import block_gradients, curvatures
from qtk.observe.trace import fold, trace
from qtk.pipeline.assign import Assignment, assign
from qtk.pipeline.attention import quantize_attention
from qtk.pipeline.keeper import Keeper, Store
from qtk.pipeline.learning import Learning, say_who_disagrees
from qtk.pipeline.progress import Bar, progress_bar
from qtk.pipeline.request import Request
from qtk.pipeline.site import quantize_outside, quantize_site
from qtk.pipeline.state import State, identity
from qtk.record import Record

logger = logging.getLogger("qtk")

Model = Any  # a transformers model


def run(
    model: nn.Module | str | Path, calib: Any, tokenizer: Any, request: Request, *, backend: str,
    resume: Path | None, progress: bool, inplace: bool,
) -> Model:  # fmt: skip
    """What `qtk.quantize` does once it is known what every layer becomes.

    Args:
        model, calib, tokenizer, backend, progress, inplace: of `qtk.quantize`.
        resume: the folder of finished blocks, or None.

    Raises:
        QtkError: as `qtk.quantize`.
    """
    source, blocks = opened(model, backend, request.blocks)
    found = assign(source, blocks, request.default, request.overrides)
    request.check(found)
    if not blocks[0].follows:
        request.check_network(calib)
    batches = calibration(source, calib, tokenizer, request, found)
    state = _state(resume, source, request, batches, backend)
    teacher, qmodel = _copies(source, request, inplace)
    with progress_bar(progress) as bar:
        folded: tuple[str, ...] = ()
        if batches is not None and not blocks[0].follows:
            blocks, folded = _traced(qmodel, blocks, batches[0], found)
        blocks = _merged(qmodel, blocks, request)
        carried_out(
            qmodel, teacher, blocks, batches, request, found, backend, bar, state, folded=folded
        )
    finish(qmodel)
    return qmodel


@torch.no_grad()
def carried_out(
    qmodel: Model, teacher: Model, blocks: Sequence[Block], batches: list[Batch] | None,
    request: Request, found: Assignment, backend: str, bar: Bar, state: State | None = None,
    store: Store | None = None, folded: Sequence[str] = (),
) -> None:  # fmt: skip
    """Quantizes a model in place, block after block, and attaches the record of it.

    Args:
        teacher: the float model, to learn from.
        state: where finished blocks are kept.
        store: where blocks are that memory does not hold.
        folded: norms that are folded already, for the record.
    """
    learning = Learning(request, bar.learning)
    keeper = Keeper(qmodel, learning, request.attention, backend, state, store)
    for site in bar.over(_sites(qmodel, blocks, batches, found, keeper), blocks):
        for choice, part in found.parts(site):
            keeper.made |= quantize_site(qmodel, part, choice, backend, bar.fitting)
        quantize_attention(qmodel, site, request.attention, backend)
    path = None if state is None else state.learning
    made = learning.after_all(qmodel, teacher, batches, keeper.made, path)
    made |= quantize_outside(qmodel, found.outside, backend)
    layers = {base_name(qmodel, name): layer for name, layer in made.items()}
    told = request.told(batches, learning.told())
    norms = tuple(base_name(qmodel, name) for name in folded)
    attach(qmodel, Record(layers, told, backend, request.attention, norms))


def opened(
    model: nn.Module | str | Path, backend: str, wanted: Sequence[str] | None = None
) -> tuple[Model, tuple[Block, ...]]:
    """The float model and its blocks.

    Args:
        wanted: patterns of the names of a plain network's blocks.

    Raises:
        ModelError: not a model of a family that is known, already quantized, or not finite.
        BackendError: it cannot run where the model is.
    """
    source = load_float(model)
    blocks = describe(source, wanted)
    check_float(source)
    resolve_backend(next(source.parameters()), backend)
    return source, blocks


def calibration(
    source: Model, calib: Any, tokenizer: Any, request: Request, found: Assignment
) -> list[Batch] | None:
    """The calibration batches."""
    say_who_disagrees(request, found)
    if calib is not None:
        return _of_all_ranks(prepare(source, calib, tokenizer, request.seed, request.samples))
    if any(choice.scheme.a is not None for choice in found.quantized.values()):
        logger.warning(
            "no calibration data: activations are dynamic per token, and shift and scale come from "
            "the LayerNorms' own parameters. A few hundred unlabelled samples (calib=) do better."
        )
    return None


def _of_all_ranks(batches: list[Batch]) -> list[Batch]:
    """The same batches on every rank: those of one, where all have the same, or all in a row."""
    sums = ranks.together(lambda: [[*map(checksum, batch.values())] for batch in batches])
    if all(found == sums[0] for found in sums):
        return batches
    return [batch for part in ranks.together(lambda: batches) for batch in part]


def _state(
    folder: Path | None, source: Model, request: Request, batches: list[Batch] | None, backend: str
) -> State | None:
    """What was finished before, if that is kept."""
    if folder is None:
        return None
    return State.open(folder, identity(fingerprint(source), request, batches, backend))


def _copies(source: Model, request: Request, inplace: bool) -> tuple[Model, Model]:
    """The float model to learn from, and the model to be quantized, which cannot be saved yet."""
    teacher = copy.deepcopy(source).eval() if inplace and request.learn == "model" else source
    qmodel = (source if inplace else copy.deepcopy(source)).eval().requires_grad_(False)
    refuse_saving(qmodel)
    return teacher, qmodel


def _traced(
    qmodel: Model, blocks: Sequence[Block], batch: Batch, found: Assignment
) -> tuple[tuple[Block, ...], tuple[str, ...]]:
    """The blocks in the order in which they run, and the norms folded into their layers, in place.

    Layers that do not run stay as they are.

    Raises:
        ModelError: none of them runs, or one runs several times.
    """
    seen = trace(qmodel, [name for block in blocks for name in block.linears], batch)
    twice = [n for n, calls in seen.calls.items() if calls > 1 and n in found.quantized]
    if twice:
        raise ModelError(
            f"{twice[0]} runs {seen.calls[twice[0]]} times in one call, and one grid cannot serve "
            f"what it reads each time: leave it in floating point, skip=[{twice[0]!r}]"
        )
    place = {name: i for i, name in enumerate(seen.calls)}
    ordered = [block.ordered(place) for block in blocks if any(n in place for n in block.linears)]
    if not ordered:
        raise ModelError(f"none of the layers of {type(qmodel).__name__} runs on the first batch")
    norms = {norm: layer for norm, layer in seen.norms.items() if layer in found.quantized}
    return tuple(sorted(ordered, key=lambda b: place[b.linears[0]])), fold(qmodel, norms)


@torch.no_grad()
def _merged(qmodel: Model, blocks: Sequence[Block], request: Request) -> tuple[Block, ...]:
    """The blocks after the default method has moved into the weights what it can, in place."""
    fold_scales(qmodel, blocks)
    merge = request.default.recipe.transform.merge
    if merge is None or request.default.scheme.w is None:
        return tuple(blocks)
    return merge(qmodel, blocks)


def _sites(
    qmodel: Model, blocks: Sequence[Block], batches: Sequence[Batch] | None, found: Assignment,
    keeper: Keeper,
) -> Iterator[Site]:  # fmt: skip
    """The sites of all blocks that are not finished, in order."""
    request = keeper.learning.request
    if batches is None:
        return imagine(qmodel, blocks, request.seed, keeper=keeper)
    gradients = None
    if any(choice.recipe.needs_gradients for choice in found.quantized.values()):
        gradients = block_gradients(qmodel, blocks, batches, request.seed)
    shared = gradients is None and request.learn != "block"  # those look at every batch
    curved = partial(curvatures, blocks=blocks, batches=batches, seed=request.seed)
    return walk(qmodel, blocks, batches, gradients=gradients, keeper=keeper, shared=shared,
                curvatures=curved)  # fmt: skip
