"""quantize(): the whole method on one page, read from top to bottom."""

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from qtk import checkpoint
from qtk.assign import asked_for, assign, by_scheme, special_schemes
from qtk.attend import quantize_attention
from qtk.discover import load
from qtk.errors import SchemeError
from qtk.integrations.transformers import attach, load_float
from qtk.layers import quantize_outside, quantize_site, rounded_to_nearest, transform_of
from qtk.models import QKV, Block, describe, fold_scales
from qtk.modules.attention import install
from qtk.modules.base import resolve_backend
from qtk.modules.linear import QuantLinear
from qtk.modules.patch import QuantPatchConv
from qtk.observe import Batch, Site, imagine, walk
from qtk.observe.batches import SAMPLES, prepare
from qtk.observe.probe import block_gradients
from qtk.progress import Bar, progress_bar
from qtk.recipes import Recipe
from qtk.reconstruct import learns_block, learns_model, reconstruct_block, reconstruct_model
from qtk.scheme import FLOAT, AttentionScheme, Scheme
from qtk.sensitivity import KEPT_BITS, sensitive, share_of

logger = logging.getLogger("qtk")


def quantize(
    model: nn.Module | str | Path,
    w: int = 8,
    a: int = 8,
    calib: Any = None,
    tokenizer: Any = None,
    *,
    method: str | None = None,
    rounding: str | None = None,
    ranges: str | None = None,
    activations: str = "static",
    weights: str = "symmetric",
    attention: str = "float",
    softmax: str = "float",
    softmax_bits: int | None = None,
    group_size: int | None = None,
    bits: dict[str, tuple[int, int]] | str | None = None,
    skip: Sequence[str] | None = None,
    backend: str = "auto",
    preset: str | None = None,
    resume: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
    inplace: bool = False,
) -> nn.Module:
    """Turns a transformers BERT, OPT or ViT into the same model computing in low-bit integers.

    Args:
        model: a model in floating point, or the path or hub name of one.
        w, a: bits of weights (2 to 8, or 16) and activations (4 to 8, or 16); 16 is floating point.
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
    _check_seed(seed)
    torch.manual_seed(seed)
    products = AttentionScheme.of(attention, softmax, softmax_bits, a)
    if products is not None and products.needs_data and calib is None:
        raise SchemeError(f"{products.name} needs calibration data: pass calib=")
    scheme_of = partial(
        Scheme.of,
        activations=activations if calib is not None or activations != "static" else "token",
        group_size=group_size,
        weights=weights,
    )
    share = share_of(bits) if isinstance(bits, str) else None
    default = scheme_of(w, a)
    special = special_schemes(None if isinstance(bits, str) else bits, skip, scheme_of)
    recipe_of = partial(Recipe.of, method=method, rounding=rounding, ranges=ranges, preset=preset)
    recipe = recipe_of(a)
    rounder = load("round", recipe.rounding)
    _check_learning(recipe.rounding, rounder, calib, resume)

    source = load_float(model)
    blocks = describe(source)
    checkpoint.check_float(source)
    resolve_backend(next(source.parameters()), backend)
    schemes = assign(blocks, default, special)
    extra = asked_for(source, blocks, special)
    if not extra and products is None and all(scheme.w is None for scheme in schemes.values()):
        raise SchemeError("nothing is left to quantize: w=16, or skip matches every linear")
    batches = None
    if calib is not None:
        batches = prepare(source, calib, tokenizer, seed, getattr(rounder, "SAMPLES", SAMPLES))
    elif any(scheme.a for scheme in schemes.values()):
        _say_what_data_would_give()
    if share is not None:
        if batches is None:
            raise SchemeError(f"bits={bits!r} measures on data: give calib")
        wide = scheme_of(max(w, KEPT_BITS), max(a, KEPT_BITS))
        alone = partial(rounded_to_nearest, schemes=schemes, recipe=recipe, backend=backend)
        chosen = sensitive(source, blocks, batches, alone, share)
        schemes |= {name: wide for name in chosen if schemes[name].w is not None}

    teacher = copy.deepcopy(source).eval() if inplace and learns_model(rounder) else source
    qmodel = (source if inplace else copy.deepcopy(source)).eval().requires_grad_(False)
    fold_scales(qmodel, blocks)
    merge = getattr(transform_of(recipe), "prepare", None)
    if merge is not None and default.a is not None:
        blocks = merge(qmodel, blocks)
    work = _Work(schemes, recipe_of, recipe, rounder, products, backend, seed)
    with torch.no_grad(), progress_bar(progress) as bar:
        layers = _quantize_blocks(qmodel, blocks, batches, work, bar)
        if learns_model(rounder) and batches is not None:
            path = None if resume is None else Path(resume)
            reconstruct_model(rounder, qmodel, teacher, batches, seed, bar.learning, path)
    layers |= _quantize_outside(qmodel, extra, backend)
    told = {
        "method": recipe.public_method, "rounding": recipe.rounding, "ranges": recipe.ranges,
        "w": w, "a": a, "seed": seed,
        "calibration_batches": len(batches or ()),
    }  # fmt: skip
    checkpoint.finish(qmodel)
    attach(qmodel, checkpoint.Record(layers, told, backend, products))
    return qmodel


@dataclass(frozen=True)
class _Work:
    """What is to be done to the blocks."""

    schemes: dict[str, Scheme]
    recipe_of: Callable[[int], Recipe]  # by activation bits
    recipe: Recipe
    rounder: ModuleType
    products: AttentionScheme | None
    backend: str
    seed: int


def _quantize_blocks(
    qmodel: nn.Module, blocks: Sequence[Block], batches: Sequence[Batch] | None, work: _Work,
    bar: Bar,
) -> dict[str, checkpoint.Layer]:  # fmt: skip
    """Replaces the linears of all blocks, in place; returns the record of each."""
    layers: dict[str, checkpoint.Layer] = {}
    groups = sum(len(block.groups) for block in blocks)
    for site in bar.over(_sites(qmodel, blocks, batches, work, bar), groups):
        for scheme, part in by_scheme(site, work.schemes):
            if scheme.w is None:
                continue
            recipe = work.recipe_of(scheme.a.bits if scheme.a else FLOAT)
            for name, linear, quality in quantize_site(part, scheme, recipe, work.backend):
                qmodel.set_submodule(name, linear)
                layers[checkpoint.base_name(qmodel, name)] = checkpoint.Layer(
                    scheme, linear.bias is not None, linear.transform, linear.rotation, quality
                )
        if work.products is not None and site.group.name == QKV:
            found = quantize_attention(site, qmodel, work.products, work.backend)
            install(qmodel.get_submodule(str(site.block.attention)), found)
    if learns_model(work.rounder) or learns_block(work.rounder):
        # what each layer gave before it was learned is of no use
        layers = {name: replace(layer, sqnr=None) for name, layer in layers.items()}
    return layers


def _sites(
    qmodel: nn.Module, blocks: Sequence[Block], batches: Sequence[Batch] | None, work: _Work,
    bar: Bar,
) -> Iterator[Site]:  # fmt: skip
    """The sites of all blocks; behind each block it is learned, if the rounder does that."""
    if batches is None:
        return imagine(qmodel, blocks, work.seed)
    gradients = None
    if work.recipe.needs_gradients:
        gradients = block_gradients(qmodel, blocks, batches, work.seed)
    learn = partial(reconstruct_block, work.rounder, seed=work.seed, report=bar.learning)
    after_block = learn if learns_block(work.rounder) else None
    return walk(qmodel, blocks, batches, gradients=gradients, after_block=after_block)


def _quantize_outside(
    qmodel: nn.Module, extra: dict[str, Scheme], backend: str
) -> dict[str, checkpoint.Layer]:
    """Heads, embeddings and patches that were asked for, in place; returns the record of each."""
    layers = {}
    for name, scheme in extra.items():
        layer = quantize_outside(qmodel.get_submodule(name), scheme, backend)
        qmodel.set_submodule(name, layer)
        inner = layer.linear if isinstance(layer, QuantPatchConv) else layer
        bias = isinstance(inner, QuantLinear) and inner.bias is not None
        layers[checkpoint.base_name(qmodel, name)] = checkpoint.Layer(
            layer.scheme, bias, transform=False
        )
    return layers


def _check_seed(seed: object) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise SchemeError(f"seed={seed!r}: give an integer")


def _say_what_data_would_give() -> None:
    logger.warning(
        "no calibration data: activations are dynamic per token, and shift and scale come from the "
        "LayerNorms' own parameters. A few hundred unlabelled samples (calib=) do better."
    )


def _check_learning(rounding: str, rounder: ModuleType, calib: Any, resume: Any) -> None:
    if calib is None and (learns_model(rounder) or learns_block(rounder)):
        raise SchemeError(
            f"rounding={rounding!r} learns from data: give calib, or another rounding"
        )
    if resume is not None and not learns_model(rounder):
        raise SchemeError(f"resume goes with rounding='tuned', not with {rounding!r}")
