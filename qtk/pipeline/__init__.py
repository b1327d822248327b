"""quantize(): the whole method on one page, read from top to bottom."""

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qtk.assembly import base_name, check_float, finish
from qtk.integrations.sentence_transformers import rewrap, unwrap
from qtk.integrations.transformers import attach, load_float, refuse_saving
from qtk.models import Block, describe, fold_scales
from qtk.modules.base import resolve_backend
from qtk.observe import Batch, Site, imagine, walk
from qtk.observe.batches import prepare
from qtk.observe.gradients import block_gradients
from qtk.pipeline.assign import Assignment, assign
from qtk.pipeline.attention import quantize_attention
from qtk.pipeline.learning import Learning, say_who_disagrees
from qtk.pipeline.progress import progress_bar
from qtk.pipeline.request import Request
from qtk.pipeline.sensitivity import sensitive
from qtk.pipeline.site import quantize_outside, quantize_site, rounded_to_nearest
from qtk.record import Layer, Record

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
        model: a model in floating point, or the path or hub name of one; or a SentenceTransformer
            or CrossEncoder, whose tokenizer and length then serve for `calib`.
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
        resume: a file that learn="model" keeps its state in, and goes on from; a run that ended is
            had again at once. Delete it when the model is saved.
        seed: of what is drawn: samples from a file or folder, rows where there is no `calib`,
            labels for ranges="hessian", and the order in which learning sees its batches.
        progress: shows a bar over the blocks.
        inplace: changes `model` itself instead of a copy. Interrupted, it refuses to be saved.

    Returns:
        The model, same class and outputs, in eval mode, its parameters frozen, in the
        SentenceTransformer or CrossEncoder that was around it.

    Raises:
        QtkError: see `qtk.errors`; each message names the module and the remedy.
    """
    request = Request.of(
        w, a, calib, activations=activations, weights=weights, group_size=group_size,
        attention=attention, softmax=softmax, softmax_bits=softmax_bits, method=method,
        rounding=rounding, ranges=ranges, learn=learn, preset=preset, bits=bits, skip=skip,
        resume=resume, seed=seed,
    )  # fmt: skip
    given = unwrap(model, calib, tokenizer)
    calib, tokenizer = given.data, given.tokenizer
    source, blocks = _opened(given.model, backend)
    found = assign(source, blocks, request.default, request.overrides)
    request.check(found)
    batches = _data(source, calib, tokenizer, request, found)
    found = _widened(source, blocks, batches, request, found, backend)
    teacher, qmodel = _copies(source, request, inplace)
    with torch.no_grad(), progress_bar(progress) as bar:
        made: dict[str, Layer] = {}
        learning = Learning(request, bar.learning)
        blocks = _merged(qmodel, blocks, request)
        for site in bar.over(_sites(qmodel, blocks, batches, found, learning), blocks):
            for choice, part in found.parts(site):
                made |= quantize_site(qmodel, part, choice, backend)
            quantize_attention(qmodel, site, request.attention, backend)
        made = learning.after_all(qmodel, teacher, batches, made)
        made |= quantize_outside(qmodel, found.outside, backend)
    finish(qmodel)
    layers = {base_name(qmodel, name): layer for name, layer in made.items()}
    told = request.told(batches, learning.told())
    attach(qmodel, Record(layers, told, backend, request.attention))
    whole: nn.Module = rewrap(model, qmodel, inplace=inplace)
    return whole


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


def _data(
    source: Model, calib: Any, tokenizer: Any, request: Request, found: Assignment
) -> list[Batch] | None:
    """The calibration batches."""
    say_who_disagrees(request, found)
    if calib is not None:
        return prepare(source, calib, tokenizer, request.seed, request.samples)
    if any(choice.scheme.a is not None for choice in found.quantized.values()):
        logger.warning(
            "no calibration data: activations are dynamic per token, and shift and scale come from "
            "the LayerNorms' own parameters. A few hundred unlabelled samples (calib=) do better."
        )
    return None


def _widened(
    source: Model, blocks: Sequence[Block], batches: list[Batch] | None, request: Request,
    found: Assignment, backend: str,
) -> Assignment:  # fmt: skip
    """With eight bits for the layers that bits="auto" finds most sensitive."""
    if request.share is None or batches is None:
        return found

    def alone(site: Site) -> Iterator[tuple[str, nn.Module]]:
        return rounded_to_nearest(site, found, backend)

    names = sensitive(source, blocks, batches, alone, request.share)
    wide = dict.fromkeys(names, request.wide)
    return assign(source, blocks, request.default, {**request.overrides, **wide})


def _copies(source: Model, request: Request, inplace: bool) -> tuple[Model, Model]:
    """The float model to learn from, and the model to be quantized, which cannot be saved yet."""
    teacher = copy.deepcopy(source).eval() if inplace and request.learn == "model" else source
    qmodel = (source if inplace else copy.deepcopy(source)).eval().requires_grad_(False)
    refuse_saving(qmodel)
    return teacher, qmodel


def _merged(qmodel: Model, blocks: Sequence[Block], request: Request) -> tuple[Block, ...]:
    """The blocks after the default method has moved into the weights what it can, in place."""
    fold_scales(qmodel, blocks)
    merge = request.default.recipe.transform.merge
    if merge is None or request.default.scheme.w is None:
        return tuple(blocks)
    return merge(qmodel, blocks)


def _sites(
    qmodel: Model, blocks: Sequence[Block], batches: Sequence[Batch] | None, found: Assignment,
    learning: Learning,
) -> Iterator[Site]:  # fmt: skip
    """The sites of all blocks, in order; a block may learn once its own are quantized."""
    seed = learning.request.seed
    if batches is None:
        return imagine(qmodel, blocks, seed)
    gradients = None
    if any(choice.recipe.needs_gradients for choice in found.quantized.values()):
        gradients = block_gradients(qmodel, blocks, batches, seed)
    return walk(qmodel, blocks, batches, gradients=gradients, after_block=learning.after_block)
