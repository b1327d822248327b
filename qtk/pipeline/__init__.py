"""quantize(): the whole method on one page, read from top to bottom."""

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qtk import ranks
from qtk.assembly import base_name, check_float, finish
from qtk.integrations.transformers import attach, load_float, refuse_saving
from qtk.integrity import checksum
from qtk.models import Block, describe, fold_scales
from qtk.modules.base import resolve_backend
from qtk.observe import Batch, Site, imagine, walk
from qtk.observe.batches import prepare
from qtk.observe.gradients import block_gradients
from qtk.pipeline.assign import Assignment, assign
from qtk.pipeline.attention import quantize_attention
from qtk.pipeline.keeper import Keeper, Store
from qtk.pipeline.learning import Learning, say_who_disagrees
from qtk.pipeline.progress import Bar, progress_bar
from qtk.pipeline.request import Request
from qtk.pipeline.sensitivity import sensitive
from qtk.pipeline.site import quantize_outside, quantize_site, rounded_to_nearest
from qtk.pipeline.state import State, check, identity, weights_of
from qtk.record import Record

logger = logging.getLogger("qtk")

Model = Any  # a transformers model
Part = Any  # a name, a module with `find`, or such a function


def quantize(
    model: nn.Module | str | Path,
    w: int | str = 8,
    a: int | str = 8,
    calib: Any = None,
    tokenizer: Any = None,
    *,
    activations: str = "static",
    weights: str = "symmetric",
    group_size: int | None = None,
    attention: str = "float",
    softmax: str = "float",
    softmax_bits: int | None = None,
    method: Part | None = None,
    rounding: Part | None = None,
    ranges: Part | None = None,
    learn: str | None = None,
    preset: str | None = None,
    bits: Mapping[str, Any] | str | None = None,
    skip: Sequence[str] | None = None,
    backend: str = "auto",
    resume: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
    inplace: bool = False,
) -> nn.Module:
    """Turns a transformers BERT, OPT or ViT into the same model computing in low-bit integers.

    Args:
        model: a model in floating point, or the path or hub name of one.
        w, a: bits of weights (2 to 8, or 16) and activations (4 to 8, or 16); 16 is floating point.
            "fp8" for both is e4m3: weights per channel, activations per token.
        calib: batches (dicts of tensors), strings, or a path to a text file or image folder.
            Without any, activations are dynamic and the norms' own parameters give shift and scale.
        tokenizer: tokenizer or image processor for `calib`; looked for beside the model.

        activations: What is quantized, and on which grids. "static" (one scale per tensor) or
            "token" (dynamic, one scale per token).
        weights: "symmetric", or "asymmetric" (a zero point for each scale), which needs a=16.
        group_size: weights that share a scale along the input; None, or more than a row has, is a
            whole row.
        attention: operands of attention's two products: "float", or "int8" to "int4", which
            needs `calib` for v's scales; q and k have one dynamic scale per token and head. Codes
            of fewer than 8 bits are stored and multiplied as int8.
        softmax: "float", "uniform", "matthew" (APQ-ViT; needs `calib`), "log2", "log-sqrt2", or
            "code" (logarithmic, without an exponential); see `qtk_kernels/_softmax.py`.
        softmax_bits: of its codes; by default the activations' for "uniform" and "matthew", 4 for
            the logarithms. Of "code" 5, 6 or 7: one, two or four steps an octave (the default).

        method: How. The equivalent transform: "os+", "smoothquant", "rotate", "os+rotate",
            "equalize+rotate", "none". This, `rounding` and `ranges` may also be a module with a
            function `find`, or such a function; see CONTRIBUTING.
        rounding: how weights become codes: "nearest", "gptq", "adaround", "flexround"; "block" and
            "tuned" are "gptq" and then learn="block" or "model".
        ranges: where activation grids end; "auto" or a file in qtk/ranges.
        learn: what goes on learning from the codes: "block" (one after the other), "model" (end to
            end) or "none". One choice of the whole model.
        preset: "fast", "balanced" (the default) or "best": fills in method, rounding and ranges
            where they are not given, for each layer by its own bits; qtk/pipeline/recipes.py says
            with what, benchmarks what each costs.

        bits: Where. {pattern of module names: (w, a)}, first match wins, the rest as `w` and `a`
            say. In the place of a pair a dict of w, a, group_size, activations, weights, method,
            rounding and ranges. Heads, pooler and embeddings stay in floating point unless a
            pattern names them alone. "auto" keeps the most sensitive layers at 8 bits, a tenth of
            the weights at most; "auto:0.2" a fifth.
        skip: patterns of module names left in floating point.

        backend: Bookkeeping. "auto" (by device), "triton", "cpu" or "reference".
        resume: a folder that keeps every finished block and the state of learning, and is gone on
            from: interrupted at any moment, the same call ends with the same model, and makes the
            unfinished block alone again. Delete it when the model is saved.
        seed: of what is drawn: samples from a file or folder, rows where there is no `calib`,
            labels for ranges="hessian", and the order in which learning sees its batches.
        progress: shows a bar over the blocks.
        inplace: changes `model` itself instead of a copy. Interrupted, it refuses to be saved.

    Returns:
        The model, same class and outputs, in eval mode, its parameters frozen.

    Raises:
        QtkError: see `qtk.errors`; each message names the module and the remedy.
    """
    request = Request.of(
        w, a, calib, activations=activations, weights=weights, group_size=group_size,
        attention=attention, softmax=softmax, softmax_bits=softmax_bits, method=method,
        rounding=rounding, ranges=ranges, learn=learn, preset=preset, bits=bits, skip=skip,
        seed=seed,
    )  # fmt: skip
    folder = check(resume)
    source, blocks = _opened(model, backend)
    found = assign(source, blocks, request.default, request.overrides)
    request.check(found)
    batches = calibration(source, calib, tokenizer, request, found)
    state = _state(folder, source, request, batches, backend)
    found = _widened(source, blocks, batches, request, found, backend, state)
    teacher, qmodel = _copies(source, request, inplace)
    with progress_bar(progress) as bar:
        blocks = _merged(qmodel, blocks, request)
        carried_out(qmodel, teacher, blocks, batches, request, found, backend, bar, state)
    finish(qmodel)
    return qmodel


@torch.no_grad()
def carried_out(
    qmodel: Model, teacher: Model, blocks: Sequence[Block], batches: list[Batch] | None,
    request: Request, found: Assignment, backend: str, bar: Bar, state: State | None = None,
    store: Store | None = None,
) -> None:  # fmt: skip
    """Quantizes a model in place, block after block, and attaches the record of it.

    Args:
        teacher: the float model, to learn from.
        state: where finished blocks are kept.
        store: where blocks are that memory does not hold.
    """
    learning = Learning(request, bar.learning)
    keeper = Keeper(qmodel, learning, request.attention, backend, state, store)
    for site in bar.over(_sites(qmodel, blocks, batches, found, keeper), blocks):
        for choice, part in found.parts(site):
            keeper.made |= quantize_site(qmodel, part, choice, backend)
        quantize_attention(qmodel, site, request.attention, backend)
    path = None if state is None else state.learning
    made = learning.after_all(qmodel, teacher, batches, keeper.made, path)
    made |= quantize_outside(qmodel, found.outside, backend)
    layers = {base_name(qmodel, name): layer for name, layer in made.items()}
    told = request.told(batches, learning.told())
    attach(qmodel, Record(layers, told, backend, request.attention))


def _opened(model: nn.Module | str | Path, backend: str) -> tuple[Model, tuple[Block, ...]]:
    """The float model and its blocks.

    Raises:
        ModelError: not a model of a family that is known, already quantized, or not finite.
        BackendError: it cannot run where the model is.
    """
    source = load_float(model)
    blocks = describe(source)
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
    return State.open(folder, identity(weights_of(source), request, batches, backend))


def _widened(
    source: Model, blocks: Sequence[Block], batches: list[Batch] | None, request: Request,
    found: Assignment, backend: str, state: State | None,
) -> Assignment:  # fmt: skip
    """With eight bits for the layers that bits="auto" finds most sensitive."""
    if request.share is None or batches is None:
        return found

    def alone(site: Site) -> Iterator[tuple[str, nn.Module]]:
        return rounded_to_nearest(site, found, backend)

    names = None if state is None else state.sensitive()
    if names is None:
        names = sensitive(source, blocks, batches, alone, request.share)
        if state is not None:
            state.keep_sensitive(names)
    wide = dict.fromkeys(names, request.wide)
    return assign(source, blocks, request.default, {**request.overrides, **wide})


def _copies(source: Model, request: Request, inplace: bool) -> tuple[Model, Model]:
    """The float model to learn from, and the model to be quantized, which cannot be saved yet."""
    teacher = copy.deepcopy(source).eval() if inplace and request.learn == "model" else source
    qmodel = (source if inplace else copy.deepcopy(source)).eval().requires_grad_(False)
    refuse_saving(qmodel)
    return teacher, qmodel


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
    return walk(qmodel, blocks, batches, gradients=gradients, keeper=keeper, shared=shared)
