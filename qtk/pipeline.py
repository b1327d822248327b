"""quantize(): the whole method on one page, read from top to bottom."""

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from qtk import checkpoint
from qtk.assign import asked_for, assign, by_scheme, special_schemes
from qtk.attend import quantize_attention
from qtk.discover import load
from qtk.errors import ModelError, SchemeError
from qtk.integrations.transformers import attach, load_float
from qtk.models import describe
from qtk.modules.attention import install
from qtk.modules.embedding import QuantEmbedding
from qtk.modules.linear import InputGrid, QuantLinear, resolve_backend
from qtk.modules.patch import QuantPatchConv, is_patch_conv
from qtk.numerics import expand_groups, scale_and_zero_point, sqnr
from qtk.observe import Site, imagine, walk
from qtk.observe.batches import prepare
from qtk.observe.probe import block_gradients
from qtk.recipes import Recipe
from qtk.reconstruct import reconstruct_block, reconstruct_model
from qtk.round import Problem
from qtk.scheme import FLOAT, AttentionScheme, Format, Scheme
from qtk.sensitivity import KEPT_BITS, sensitive, share_of
from qtk.transform import Change

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
        method: the equivalent transform: "os+", "smoothquant", "rotate", "os+rotate", "none".
        rounding: how weights become codes: "nearest", "gptq", "adaround", "flexround", "block"
            (each block learned), "tuned" (the whole model learned, end to end).
        ranges: where static activation grids end; "auto" or a file in qtk/ranges.
        activations: "static" (one scale a tensor) or "token" (dynamic, one scale a token).
        attention: operands of attention's two products: "float", or "int8" to "int4", which
            needs `calib` for v's scales; q and k have one dynamic scale a token and head.
        softmax: "float", "uniform", "matthew" (APQ-ViT; needs `calib`), "log2", "log-sqrt2", or
            "code" (logarithmic, without an exponential); see `qtk_kernels/_softmax.py`.
        softmax_bits: of its codes; by default the activations' for "uniform" and "matthew", 4 for
            the logarithms. Of "code" 5, 6 or 7: one, two or four steps an octave (the default).
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
    )
    share = share_of(bits) if isinstance(bits, str) else None
    default = scheme_of(w, a)
    special = special_schemes(None if isinstance(bits, str) else bits, skip, scheme_of)
    recipe_of = partial(Recipe.of, method=method, rounding=rounding, ranges=ranges, preset=preset)
    recipe = recipe_of(a)
    source = load_float(model)
    blocks = describe(source)
    checkpoint.check_float(source)
    resolve_backend(next(source.parameters()), backend)
    schemes = assign(blocks, default, special)
    extra = asked_for(source, blocks, special)
    if not extra and products is None and all(scheme.w is None for scheme in schemes.values()):
        raise SchemeError("nothing is left to quantize: w=16, or skip matches every linear")
    batches = None if calib is None else prepare(source, calib, tokenizer, seed)
    if batches is None and any(scheme.a for scheme in schemes.values()):
        _say_what_data_would_give()
    if share is not None:
        if batches is None:
            raise SchemeError(f"bits={bits!r} measures on data: give calib")
        wide = scheme_of(max(w, KEPT_BITS), max(a, KEPT_BITS))
        alone = partial(_alone, schemes=schemes, recipe=recipe, backend=backend)
        for name in sensitive(source, blocks, batches, alone, share):
            schemes[name] = wide if schemes[name].w is not None else schemes[name]
    rounder = load("round", recipe.rounding)
    learns_model, learns_block = hasattr(rounder, "refine_model"), hasattr(rounder, "refine_block")
    _check_learning(recipe.rounding, learns_model, learns_block, batches, resume)
    teacher = copy.deepcopy(source).eval() if learns_model and inplace else source
    qmodel = (source if inplace else copy.deepcopy(source)).eval().requires_grad_(False)

    prepare_model = getattr(_transform(recipe), "prepare", None)
    if prepare_model is not None and default.a is not None:
        blocks = prepare_model(qmodel, blocks)

    layers: dict[str, checkpoint.Layer] = {}
    gradients = None
    if batches is not None and recipe.needs_gradients:
        gradients = block_gradients(qmodel, blocks, batches, seed)
    with torch.no_grad(), _progress(progress) as bar:
        if batches is None:
            sites = imagine(qmodel, blocks, seed)
        else:
            learn = partial(reconstruct_block, rounder, seed=seed, report=bar.learning)
            sites = walk(
                qmodel, blocks, batches, gradients=gradients,
                after_block=learn if learns_block else None,
            )  # fmt: skip
        for site in bar.over(sites, 4 * len(blocks)):
            for scheme, part in by_scheme(site, schemes):
                if scheme.w is None:
                    continue
                chosen = recipe_of(scheme.a.bits if scheme.a else FLOAT)
                for name, linear, quality in quantize_site(part, scheme, chosen, backend):
                    qmodel.set_submodule(name, linear)
                    layers[checkpoint.base_name(qmodel, name)] = checkpoint.Layer(
                        scheme, linear.bias is not None, linear.transform, linear.rotation, quality
                    )
            if products is not None and site.group.name == "qkv":
                found = quantize_attention(site, qmodel, products, backend)
                install(qmodel.get_submodule(site.block.attention), found)
        if learns_model:
            assert batches is not None
            path = None if resume is None else Path(resume)
            reconstruct_model(rounder, qmodel, teacher, batches, seed, bar.learning, path)
    if learns_model or learns_block:  # what each layer gave before it was learned is of no use
        layers = {name: replace(layer, sqnr=None) for name, layer in layers.items()}
    for name, scheme in extra.items():
        layer = quantize_outside(qmodel.get_submodule(name), scheme, backend)
        qmodel.set_submodule(name, layer)
        inner = layer.linear if isinstance(layer, QuantPatchConv) else layer
        kept = inner.scheme if isinstance(inner, QuantLinear) else replace(scheme, a=None)
        layers[checkpoint.base_name(qmodel, name)] = checkpoint.Layer(
            kept, inner.bias is not None, transform=False
        )
    told = {
        "method": recipe.public_method, "rounding": recipe.rounding, "ranges": recipe.ranges,
        "w": w, "a": a, "seed": seed,
        "calibration_batches": len(batches or ()),
    }  # fmt: skip
    checkpoint.finish(qmodel)
    attach(qmodel, checkpoint.Record(layers, told, backend, products))
    return qmodel


def quantize_site(
    site: Site, scheme: Scheme, recipe: Recipe, backend: str
) -> Iterator[tuple[str, QuantLinear, float | None]]:
    """The linears of one site, quantized, with the SQNR (dB) of what each computes."""
    change = _change(site, scheme, recipe)
    grid = input_grid(site, change, scheme.a, recipe)
    inputs = grid.fake_quantize(site.rows) if site.has_data else None  # [T, K]
    for name, linear in site.linears.items():
        wanted = site.float_rows @ linear.weight.float().T if len(site.float_rows) else None
        yield name, *quantize_linear(linear, change, grid, inputs, wanted, scheme, recipe, backend)


def quantize_linear(
    linear: nn.Linear, change: Change, grid: InputGrid, inputs: Tensor | None,
    wanted: Tensor | None, scheme: Scheme, recipe: Recipe, backend: str,
) -> tuple[QuantLinear, float | None]:  # fmt: skip
    """Rounds one weight and corrects its bias.

    Args:
        inputs: [T, K], what the layer will read, on its grid.
        wanted: [T, N], what the float model computes there, without the bias.
    """
    assert scheme.w is not None
    weight = linear.weight.float()
    problem = Problem(change.weight(weight), scheme.w, inputs, wanted)
    codes, scale = load("round", recipe.rounding).find(problem)
    bias = None if linear.bias is None else linear.bias.float()
    quality = None
    if inputs is not None and wanted is not None:
        w_hat = codes * expand_groups(scale, weight.shape[1], scheme.w.group_size)
        got = inputs @ w_hat.T
        correction = (wanted - got).mean(0)  # makes the mean output what the float model's is
        quality = sqnr(wanted, got + correction)
        bias = correction if bias is None else bias + correction
    elif bool((change.shift != 0).any()):
        extra = weight @ change.shift
        bias = extra if bias is None else bias + extra
    return QuantLinear.from_codes(codes, scale, bias, grid, scheme, backend), quality


def _alone(
    site: Site, schemes: dict[str, Scheme], recipe: Recipe, backend: str
) -> Iterator[tuple[str, QuantLinear]]:
    """The linears of one site as they would be, rounded to nearest: a first look."""
    quick = replace(recipe, rounding="nearest")
    for scheme, part in by_scheme(site, schemes):
        if scheme.w is not None:
            for name, linear, _ in quantize_site(part, scheme, quick, backend):
                yield name, linear


def input_grid(site: Site, change: Change, fmt: Format | None, recipe: Recipe) -> InputGrid:
    """How the site's input is quantized."""
    plain = bool((change.shift == 0).all() and (change.channel_scale == 1).all())
    grid = InputGrid(fmt, rotation=change.rotation)
    if not plain:
        grid = replace(grid, shift=change.shift, channel_scale=change.channel_scale)
    if fmt is None or not site.has_data:
        return grid
    importance = change.weight(site.weight()).square().sum(0)  # [K]
    batches = [change.inputs(x[mask]) for x, mask in site.sequences]
    rotated = change.rotation or site.group.rotated
    rule = load("ranges", recipe.range_rule(site.group.norm is not None, rotated))
    if fmt.granularity == "token":
        clip = rule.find_clip(batches, fmt, importance) if hasattr(rule, "find_clip") else 1.0
        return replace(grid, clip=clip)
    if site.probe is not None and hasattr(rule, "NEEDS_PROBE"):
        lo, hi = rule.find(
            batches, fmt, importance, site.probe.changed(change.inputs, change.weight)
        )
    else:
        lo, hi = rule.find(batches, fmt, importance)
    scale, zero_point = scale_and_zero_point(lo, hi, fmt)
    return replace(grid, scale=scale, zero_point=zero_point)


def quantize_outside(module: nn.Module, scheme: Scheme, backend: str) -> nn.Module:
    """A head, an embedding or a patch embedding; inputs are dynamic per token, not calibrated."""
    assert scheme.w is not None and isinstance(module, (nn.Linear, nn.Embedding, nn.Conv2d))
    weight = module.weight.float().flatten(1)
    codes, scale = load("round", "nearest").find(Problem(weight, scheme.w))
    if isinstance(module, nn.Embedding):
        only_w = replace(scheme, a=None)
        return QuantEmbedding.from_codes(codes, scale, only_w, module.weight.dtype)
    a = scheme.a and Format(scheme.a.bits, granularity="token")
    scheme = replace(scheme, a=a)
    if isinstance(module, nn.Conv2d) and not is_patch_conv(module):
        raise ModelError(f"{module}: only convolutions that cut patches can be quantized")
    linear = QuantLinear.from_codes(codes, scale, module.bias, InputGrid(a), scheme, backend)
    if isinstance(module, nn.Conv2d):
        return QuantPatchConv(linear, module.kernel_size, module.weight.dtype)
    return linear


def _transform(recipe: Recipe) -> ModuleType | None:
    return None if recipe.method is None else load("transform", recipe.method)


def _change(site: Site, scheme: Scheme, recipe: Recipe) -> Change:
    transform = _transform(recipe)
    if transform is None:
        return Change.none(site.weight().shape[1], site.weight().device)
    return transform.find(site, scheme)


def _check_seed(seed: object) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise SchemeError(f"seed={seed!r}: give an integer")


def _say_what_data_would_give() -> None:
    logger.warning(
        "no calibration data: activations are dynamic per token, and shift and scale come from the "
        "LayerNorms' own parameters. A few hundred unlabelled samples (calib=) do better."
    )


def _check_learning(
    rounding: str, learns_model: bool, learns_block: bool, batches: Any, resume: Any
) -> None:
    if batches is None and (learns_model or learns_block):
        raise SchemeError(
            f"rounding={rounding!r} learns from data: give calib, or another rounding"
        )
    if resume is not None and not learns_model:
        raise SchemeError(f"resume goes with rounding='tuned', not with {rounding!r}")


class _Bar:
    """A bar on the terminal, or nothing."""

    def __init__(self, bar: Any = None) -> None:
        self.bar = bar
        self.task = None if bar is None else bar.add_task("quantizing", total=None)

    def over(self, sites: Iterator[Site], total: int) -> Iterator[Site]:
        """The sites, shown as they pass."""
        for done, site in enumerate(sites):
            block = site.block.name.split(".")[-1]
            self._show(f"{block}.{site.group.name}", done, total)
            yield site

    def learning(self, done: int, total: int, loss: float) -> None:
        self._show(f"learning, loss {loss:.4g}", done, total)

    def _show(self, text: str, done: int, total: int) -> None:
        if self.bar is not None:
            self.bar.update(self.task, description=text, completed=done, total=total)


@contextmanager
def _progress(show: bool) -> Iterator[_Bar]:
    if not show:
        yield _Bar()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    )  # fmt: skip
    with Progress(*columns, transient=True, console=Console(stderr=True)) as bar:
        yield _Bar(bar)
