"""quantize(): the whole method on one page, read from top to bottom."""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qtk import checkpoint
from qtk.integrations.transformers import attach, load_float, refuse_saving
from qtk.models import QKV, Block, describe, fold_scales
from qtk.modules.attention import install
from qtk.modules.base import resolve_backend
from qtk.observe import Batch, Call, Site, imagine, walk
from qtk.observe.batches import prepare
from qtk.observe.gradients import block_gradients
from qtk.pipeline.assign import Assignment, assign
from qtk.pipeline.attention import quantize_attention
from qtk.pipeline.learning import Learning, say_who_disagrees
from qtk.pipeline.progress import progress_bar
from qtk.pipeline.request import Request
from qtk.pipeline.sensitivity import sensitive
from qtk.pipeline.site import quantize_outside, quantize_site, rounded_to_nearest

logger = logging.getLogger("qtk")

Model = Any  # a transformers model
Part = Any  # a name, a module with `find`, or such a function
AfterBlock = Callable[[nn.Module, Sequence[Call]], None]


def quantize(
    model: nn.Module | str | Path,
    w: int | str = 8,
    a: int | str = 8,
    calib: Any = None,
    tokenizer: Any = None,
    *,
    method: Part | None = None,
    rounding: Part | None = None,
    ranges: Part | None = None,
    learn: str | None = None,
    preset: str | None = None,
    activations: str = "static",
    weights: str = "symmetric",
    group_size: int | None = None,
    attention: str = "float",
    softmax: str = "float",
    softmax_bits: int | None = None,
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
        method: the equivalent transform: "os+", "smoothquant", "rotate", "os+rotate",
            "equalize+rotate", "none".
        rounding: how weights become codes: "nearest", "gptq", "adaround", "flexround", "block"
            (each block learned), "tuned" (the whole model learned, end to end).
        ranges: where static activation grids end; "auto" or a file in qtk/ranges.
        activations: "static" (one scale a tensor) or "token" (dynamic, one scale a token).
        attention: operands of attention's two products: "float", or "int8" to "int4", which
            needs `calib` for v's scales; q and k have one dynamic scale a token and head. Codes
            of fewer than 8 bits are stored and multiplied as int8.
        softmax: "float", "uniform", "matthew" (APQ-ViT; needs `calib`), "log2", "log-sqrt2", or
            "code" (logarithmic, without an exponential); see `qtk_kernels/_softmax.py`.
        softmax_bits: of its codes; by default the activations' for "uniform" and "matthew", 4 for
            the logarithms. Of "code" 5, 6 or 7: one, two or four steps an octave (the default).
        weights: "symmetric", or "asymmetric" (a zero point for each scale), which needs a=16.
        group_size: weights that share a scale along the input; None is a whole row.
        bits: {pattern of module names: (w, a)}, first match wins, the rest as `w` and `a` say.
            Heads, pooler and embeddings stay in floating point unless a pattern names them alone.
            "auto" keeps the most sensitive layers at 8 bits, a tenth of the weights at most;
            "auto:0.2" a fifth.
        skip: patterns of module names left in floating point.
        backend: "auto" (by device), "triton", "cpu" or "reference".
        preset: "fast", "balanced" (the default) or "best": fills in method, rounding and ranges
            where they are not given; `qtk.recipes` says with what, benchmarks what each costs.
        resume: a file that "tuned" keeps its state in, and goes on from after an interruption.
        seed: of everything drawn at random.
        progress: shows a bar over the blocks.
        inplace: changes `model` itself instead of a copy.

    Returns:
        The model, same class and outputs, in eval mode, its parameters frozen.

    Raises:
        QtkError: see `qtk.errors`; each message names the module and the remedy.
    """
    request = Request.of(
        w, a, calib, attention=attention, softmax=softmax, softmax_bits=softmax_bits, bits=bits,
        skip=skip, resume=resume, seed=seed, activations=activations, weights=weights,
        group_size=group_size, method=method, rounding=rounding, ranges=ranges, learn=learn,
        preset=preset,
    )  # fmt: skip
    source, blocks = _opened(model, backend)
    found = assign(source, blocks, request.default, request.overrides)
    request.check(found)
    batches = _data(source, calib, tokenizer, request, found)
    found = _widened(source, blocks, batches, request, found, backend)
    teacher = copy.deepcopy(source).eval() if inplace and request.learn == "model" else source
    qmodel = (source if inplace else copy.deepcopy(source)).eval().requires_grad_(False)
    refuse_saving(qmodel)
    layers: dict[str, checkpoint.Layer] = {}
    with torch.no_grad(), progress_bar(progress) as bar:
        blocks = _merged(qmodel, blocks, request)
        learning = Learning(request, bar.learning)
        sites = _sites(qmodel, blocks, batches, request, found, learning.after_block)
        for site in bar.over(sites, sum(len(block.groups) for block in blocks)):
            for choice, part in found.parts(site):
                for name, linear, made in quantize_site(part, choice, backend):
                    qmodel.set_submodule(name, linear)
                    layers[name] = made
            if request.attention is not None and site.group.name == QKV:
                products = quantize_attention(site, qmodel, request.attention, backend)
                install(qmodel.get_submodule(str(site.block.attention)), products)
        if batches is not None:
            learning.after_all(qmodel, teacher, batches)
    if learning.changed:  # what each layer gave before it was learned is of no use
        layers = {name: replace(layer, sqnr=None) for name, layer in layers.items()}
    for name, choice in found.outside.items():
        module, layers[name] = quantize_outside(name, qmodel.get_submodule(name), choice, backend)
        qmodel.set_submodule(name, module)
    checkpoint.finish(qmodel)
    layers = {checkpoint.base_name(qmodel, name): layer for name, layer in layers.items()}
    told = request.told(len(batches or ()), learning.told())
    attach(qmodel, checkpoint.Record(layers, told, backend, request.attention))
    return qmodel


def _opened(model: nn.Module | str | Path, backend: str) -> tuple[Model, tuple[Block, ...]]:
    """The float model and its blocks.

    Raises:
        ModelError: not a model of a family that is known, already quantized, or not finite.
        BackendError: it cannot run where the model is.
    """
    source = load_float(model)
    blocks = describe(source)
    checkpoint.check_float(source)
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


def _merged(qmodel: Model, blocks: Sequence[Block], request: Request) -> tuple[Block, ...]:
    """The blocks after the default method has moved into the weights what it can, in place."""
    fold_scales(qmodel, blocks)
    merge = request.default.recipe.transform.merge
    if merge is None or request.default.scheme.w is None:
        return tuple(blocks)
    return merge(qmodel, blocks)


def _sites(
    qmodel: Model, blocks: Sequence[Block], batches: Sequence[Batch] | None, request: Request,
    found: Assignment, after_block: AfterBlock,
) -> Iterator[Site]:  # fmt: skip
    """The sites of all blocks, in order; `after_block` sees each block once they are replaced."""
    if batches is None:
        return imagine(qmodel, blocks, request.seed)
    gradients = None
    if any(choice.recipe.needs_gradients for choice in found.quantized.values()):
        gradients = block_gradients(qmodel, blocks, batches, request.seed)
    return walk(qmodel, blocks, batches, gradients=gradients, after_block=after_block)
