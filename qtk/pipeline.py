"""quantize(): the whole method on one page, read from top to bottom."""

import copy
import fnmatch
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qtk import checkpoint
from qtk.discover import load
from qtk.errors import SchemeError
from qtk.integrations.transformers import attach, load_float
from qtk.models import Block, describe
from qtk.modules.linear import InputGrid, QuantLinear
from qtk.numerics import (
    expand_groups,
    fake_quantize,
    fake_quantize_token,
    scale_and_zero_point,
    sqnr,
)
from qtk.observe import Site, imagine, walk
from qtk.observe.batches import prepare
from qtk.recipes import Recipe
from qtk.round import Problem
from qtk.scheme import Format, Scheme

logger = logging.getLogger("qtk")


def quantize(
    model: nn.Module | str | Path,
    w: int = 8,
    a: int = 8,
    calib: Any = None,
    tokenizer: Any = None,
    *,
    method: str = "os+",
    rounding: str = "nearest",
    ranges: str = "auto",
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
        method: the equivalent transform: "os+", "smoothquant", "none".
        rounding: how weights become codes; a file in qtk/round.
        ranges: where static activation grids end; "auto" or a file in qtk/ranges.
        activations: "static" (one scale a tensor) or "token" (dynamic, one scale a token).
        attention, softmax, softmax_bits: the attention products and the softmax; "float".
        group_size: weights that share a scale along the input; None is a whole row.
        bits: {pattern of module names: (w, a)}, first match wins, the rest as `w` and `a` say.
        skip: patterns of module names left in floating point; heads, pooler and embeddings are.
        backend: "auto" (by device), "triton", "cpu" or "reference".
        seed: of everything drawn at random.
        progress: shows a bar over the blocks.
        inplace: changes `model` itself instead of a copy.

    Returns:
        The model, same class and outputs, in eval mode, its parameters frozen.

    Raises:
        QtkError: see `qtk.errors`; each message names the module and the remedy.
    """
    torch.manual_seed(seed)
    recipe = Recipe.of(method, rounding, ranges)
    _only_float("attention", attention)
    _only_float("softmax", softmax)
    default = Scheme.of(w, a, activations if calib is not None else "token", group_size)
    model = load_float(model)
    blocks = describe(model)
    checkpoint.check_float(model)
    schemes = assign(model, blocks, default, bits or {}, skip or ())
    batches = None if calib is None else prepare(model, calib, tokenizer, seed)
    if batches is None and default.a is not None:
        _say_what_data_would_give()
    model = (model if inplace else copy.deepcopy(model)).eval()

    layers: dict[str, checkpoint.Layer] = {}
    sites = imagine(model, blocks, seed) if batches is None else walk(model, blocks, batches)
    with torch.no_grad(), _progress(sites, 4 * len(blocks), progress) as bar:
        for site in bar:
            for scheme, names in by_scheme(site, schemes):
                if scheme.w is None:
                    continue
                for name, linear, quality in quantize_site(site, names, scheme, recipe, backend):
                    model.set_submodule(name, linear)
                    layers[checkpoint.base_name(model, name)] = checkpoint.Layer(
                        scheme, linear.bias is not None, linear.transform, quality
                    )
    if not layers:
        raise SchemeError("nothing is left to quantize: w=16, or skip matches every linear")
    told = {
        "method": method, "rounding": rounding, "ranges": ranges, "w": w, "a": a, "seed": seed,
        "calibration_batches": len(batches or ()),
    }  # fmt: skip
    checkpoint.finish(model)
    attach(model, checkpoint.Record(layers, told, backend))
    return model


def quantize_site(
    site: Site, names: list[str], scheme: Scheme, recipe: Recipe, backend: str
) -> Iterator[tuple[str, QuantLinear, float | None]]:
    """The linears of one site, quantized, with the SQNR (dB) of what each computes."""
    part = Site(
        site.block, site.group, {n: site.linears[n] for n in names}, site.sequences,
        site.float_rows, site.lo, site.hi,
    )  # fmt: skip
    weight = part.weight()  # [N of all linears, K]
    find = load("transform", recipe.method).find if recipe.method else _identity
    shift, channel_scale = find(part, scheme)
    changed = bool((shift != 0).any() or (channel_scale != 1).any())
    rows = (part.rows - shift) / channel_scale if part.has_data else None  # [T, K]
    grid, inputs = input_grid(part, rows, shift, channel_scale, weight, scheme.a, recipe)
    if not changed:
        grid = InputGrid(scale=grid.scale, zero_point=grid.zero_point, clip=grid.clip)

    assert scheme.w is not None
    for name, linear in part.linears.items():
        w = linear.weight.float()
        wanted = part.float_rows @ w.T if len(part.float_rows) else None
        problem = Problem(w * channel_scale, scheme.w, inputs, wanted)
        codes, w_scale = load("round", recipe.rounding).find(problem)
        w_hat = codes * expand_groups(w_scale, w.shape[1], scheme.w.group_size)
        bias = _bias(linear, w @ shift if changed else None)
        quality = None
        if inputs is not None and wanted is not None:
            bias, quality = _correct(linear, wanted, inputs @ w_hat.T)
        layer = QuantLinear.from_codes(codes, w_scale, bias, grid, scheme, backend)
        yield name, layer, quality


def input_grid(
    site: Site, rows: Tensor | None, shift: Tensor, channel_scale: Tensor, weight: Tensor,
    fmt: Format | None, recipe: Recipe,
) -> tuple[InputGrid, Tensor | None]:  # fmt: skip
    """How the site's input is quantized, and the rows on that grid."""
    if fmt is None or rows is None:
        return InputGrid(shift, channel_scale), rows
    if fmt.granularity == "token":
        return InputGrid(shift, channel_scale), fake_quantize_token(rows, fmt.bits)
    importance = (weight * channel_scale).square().sum(0)  # [K]
    batches = [(x[mask] - shift) / channel_scale for x, mask in site.sequences]
    rule = recipe.range_rule(site.group.norm is not None)
    lo, hi = load("ranges", rule).find(batches, fmt, importance)
    scale, zero_point = scale_and_zero_point(lo, hi, fmt)
    grid = InputGrid(shift, channel_scale, scale, zero_point)
    return grid, fake_quantize(rows, scale, zero_point, fmt)


def assign(
    model: nn.Module, blocks: Sequence[Block], default: Scheme,
    bits: dict[str, tuple[int, int]], skip: Sequence[str],
) -> dict[str, Scheme]:  # fmt: skip
    """The scheme of every linear in the blocks.

    Raises:
        SchemeError: a pattern that matches nothing, or bits out of range.
    """
    names = [n for block in blocks for group in block.groups for n in group.linears]
    for pattern in [*bits, *skip]:
        if not any(fnmatch.fnmatch(name, pattern) for name in names):
            raise SchemeError(
                f"pattern {pattern!r} matches no linear of the blocks, such as {names[0]!r}; "
                "heads, pooler and embeddings stay in floating point"
            )
    activation = "token" if default.a and default.a.granularity == "token" else "static"
    group_size = default.w.group_size if default.w else None
    special = {p: Scheme.of(w, a, activation, group_size) for p, (w, a) in bits.items()}
    special = {**dict.fromkeys(skip, Scheme(None, None)), **special}

    def scheme(name: str) -> Scheme:
        return next((s for p, s in special.items() if fnmatch.fnmatch(name, p)), default)

    return {name: scheme(name) for name in names}


def by_scheme(site: Site, schemes: dict[str, Scheme]) -> Iterator[tuple[Scheme, list[str]]]:
    """The site's linears, those with the same scheme together."""
    for scheme in dict.fromkeys(schemes[name] for name in site.linears):
        yield scheme, [name for name in site.linears if schemes[name] == scheme]


def _identity(site: Site, scheme: Scheme) -> tuple[Tensor, Tensor]:
    one = torch.ones_like(next(iter(site.linears.values())).weight[0], dtype=torch.float32)
    return one * 0, one


def _bias(linear: nn.Linear, extra: Tensor | None) -> Tensor | None:
    if linear.bias is None:
        return extra
    return linear.bias.float() if extra is None else linear.bias.float() + extra


def _correct(linear: nn.Linear, wanted: Tensor, got: Tensor) -> tuple[Tensor, float]:
    """The bias that makes the mean output what the float model's is, and the SQNR with it."""
    bias = (wanted - got).mean(0)
    quality = sqnr(wanted, got + bias)
    return bias if linear.bias is None else bias + linear.bias.float(), quality


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
