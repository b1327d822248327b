"""quantize(): the whole method on one page, read from top to bottom."""

import copy
import fnmatch
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qtk import checkpoint
from qtk.discover import load
from qtk.errors import SchemeError
from qtk.integrations.transformers import attach, load_float
from qtk.models import Block, describe
from qtk.modules.linear import InputGrid, QuantLinear, resolve_backend
from qtk.numerics import expand_groups, scale_and_zero_point, sqnr
from qtk.observe import Site, imagine, walk
from qtk.observe.batches import prepare
from qtk.recipes import Recipe
from qtk.round import Problem
from qtk.scheme import FLOAT, Format, Scheme
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
    bits: dict[str, tuple[int, int]] | None = None,
    skip: Sequence[str] | None = None,
    backend: str = "auto",
    preset: str | None = None,
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
        method: the equivalent transform: "os+", "smoothquant", "rotate", "none".
        rounding: how weights become codes: "nearest", "gptq".
        ranges: where static activation grids end; "auto" or a file in qtk/ranges.
        activations: "static" (one scale a tensor) or "token" (dynamic, one scale a token).
        attention, softmax, softmax_bits: the attention products and the softmax; "float".
        group_size: weights that share a scale along the input; None is a whole row.
        bits: {pattern of module names: (w, a)}, first match wins, the rest as `w` and `a` say.
        skip: patterns of module names left in floating point; heads, pooler and embeddings are.
        backend: "auto" (by device), "triton", "cpu" or "reference".
        preset: "fast", "balanced" (the default) or "best": fills in method, rounding and ranges
            where they are not given; `qtk.recipes` says with what, benchmarks what each costs.
        seed: of everything drawn at random.
        progress: shows a bar over the blocks.
        inplace: changes `model` itself instead of a copy.

    Returns:
        The model, same class and outputs, in eval mode, its parameters frozen.

    Raises:
        QtkError: see `qtk.errors`; each message names the module and the remedy.
    """
    torch.manual_seed(seed)
    recipe_of = partial(Recipe.of, method=method, rounding=rounding, ranges=ranges, preset=preset)
    recipe = recipe_of(a)
    _only_float("attention", attention)
    _only_float("softmax", softmax)
    if softmax_bits is not None:
        raise SchemeError("softmax_bits goes with an integer softmax; this version has none")
    scheme_of = partial(
        Scheme.of,
        activations=activations if calib is not None or activations != "static" else "token",
        group_size=group_size,
    )
    default, special = scheme_of(w, a), _special(bits, skip, scheme_of)
    source = load_float(model)
    blocks = describe(source)
    checkpoint.check_float(source)
    resolve_backend(next(source.parameters()), backend)
    schemes = assign(blocks, default, special)
    batches = None if calib is None else prepare(source, calib, tokenizer, seed)
    if batches is None and any(scheme.a for scheme in schemes.values()):
        _say_what_data_would_give()
    qmodel = (source if inplace else copy.deepcopy(source)).eval()

    layers: dict[str, checkpoint.Layer] = {}
    sites = imagine(qmodel, blocks, seed) if batches is None else walk(qmodel, blocks, batches)
    with torch.no_grad(), _progress(sites, 4 * len(blocks), progress) as bar:
        for site in bar:
            for scheme, part in by_scheme(site, schemes):
                if scheme.w is None:
                    continue
                chosen = recipe_of(scheme.a.bits if scheme.a else FLOAT)
                for name, linear, quality in quantize_site(part, scheme, chosen, backend):
                    qmodel.set_submodule(name, linear)
                    layers[checkpoint.base_name(qmodel, name)] = checkpoint.Layer(
                        scheme, linear.bias is not None, linear.transform, linear.rotation, quality
                    )
    told = {
        "method": recipe.method or "none", "rounding": recipe.rounding, "ranges": recipe.ranges,
        "w": w, "a": a, "seed": seed,
        "calibration_batches": len(batches or ()),
    }  # fmt: skip
    checkpoint.finish(qmodel)
    attach(qmodel, checkpoint.Record(layers, told, backend))
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
    rule = load("ranges", recipe.range_rule(site.group.norm is not None, change.rotation))
    if fmt.granularity == "token":
        clip = rule.find_clip(batches, fmt, importance) if hasattr(rule, "find_clip") else 1.0
        return replace(grid, clip=clip)
    lo, hi = rule.find(batches, fmt, importance)
    scale, zero_point = scale_and_zero_point(lo, hi, fmt)
    return replace(grid, scale=scale, zero_point=zero_point)


def assign(
    blocks: Sequence[Block], default: Scheme, special: Mapping[str, Scheme]
) -> dict[str, Scheme]:
    """The scheme of every linear in the blocks; the first pattern that matches wins.

    Raises:
        SchemeError: a pattern that matches nothing, or nothing left to quantize.
    """
    names = [n for block in blocks for group in block.groups for n in group.linears]
    for pattern in special:
        if not any(fnmatch.fnmatch(name, pattern) for name in names):
            raise SchemeError(
                f"pattern {pattern!r} matches no linear of the blocks, such as {names[0]!r}; "
                "heads, pooler and embeddings stay in floating point"
            )

    def scheme(name: str) -> Scheme:
        return next((s for p, s in special.items() if fnmatch.fnmatch(name, p)), default)

    schemes = {name: scheme(name) for name in names}
    if all(scheme.w is None for scheme in schemes.values()):
        raise SchemeError("nothing is left to quantize: w=16, or skip matches every linear")
    return schemes


def _special(
    bits: Mapping[str, tuple[int, int]] | None, skip: Sequence[str] | str | None,
    scheme_of: Callable[[int, int], Scheme],
) -> dict[str, Scheme]:  # fmt: skip
    """The patterns of `skip` and `bits` as schemes; `skip` comes first, and so wins."""
    bits, skip = bits or {}, [skip] if isinstance(skip, str) else skip or ()
    if not isinstance(bits, Mapping):
        raise SchemeError(f"bits={bits!r}: give {{pattern of module names: (w, a)}}")
    for pattern, pair in bits.items():
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise SchemeError(f"bits[{pattern!r}]={pair!r}: give a pair (w, a), such as (4, 8)")
    left_out = dict.fromkeys(skip, Scheme(None, None))
    chosen = {pattern: scheme_of(*pair) for pattern, pair in bits.items() if pattern not in skip}
    return {**left_out, **chosen}


def by_scheme(site: Site, schemes: dict[str, Scheme]) -> Iterator[tuple[Scheme, Site]]:
    """The site in parts, those of its linears together that have the same scheme."""
    for scheme in dict.fromkeys(schemes[name] for name in site.linears):
        same = {n: linear for n, linear in site.linears.items() if schemes[n] == scheme}
        yield scheme, replace(site, linears=same)


def _change(site: Site, scheme: Scheme, recipe: Recipe) -> Change:
    if recipe.method is None:
        return Change.none(site.weight().shape[1], site.weight().device)
    return load("transform", recipe.method).find(site, scheme)


def _only_float(name: str, value: str) -> None:
    if value != "float":
        raise SchemeError(f"{name}={value!r}: only 'float' is available in this version")


def _say_what_data_would_give() -> None:
    logger.warning(
        "no calibration data: activations are dynamic per token, and shift and scale come from the "
        "LayerNorms' own parameters. A few hundred unlabelled samples (calib=) do better."
    )


@contextmanager
def _progress(sites: Iterator[Site], total: int, show: bool) -> Iterator[Iterator[Site]]:
    """The sites, with a bar on the terminal while they pass."""
    if not show:
        yield sites
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    )  # fmt: skip
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("quantizing", total=total)

        def watched() -> Iterator[Site]:
            for site in sites:
                bar.update(task, description=f"{site.block.name.split('.')[-1]}.{site.group.name}")
                yield site
                bar.advance(task)

        yield watched()
