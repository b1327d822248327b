"""One site at a time: transform, input grid, codes, bias, and the integer linear made of them."""

from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor, nn

from qtk.assign import by_scheme
from qtk.discover import load
from qtk.errors import ModelError
from qtk.grids import Change, InputGrid, LinearSpec
from qtk.modules.base import Quantized
from qtk.modules.embedding import QuantEmbedding
from qtk.modules.linear import QuantLinear
from qtk.modules.patch import QuantPatchConv
from qtk.numerics import scale_and_zero_point, sqnr
from qtk.observe import Site
from qtk.recipes import Recipe
from qtk.round import Problem
from qtk.scheme import Format, Scheme


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
    codes, steps = load("round", recipe.rounding).find(problem)
    bias: Tensor | None = None if linear.bias is None else linear.bias.float()
    quality = None
    if inputs is not None and wanted is not None:
        got = inputs @ steps.dequantize(codes).T
        correction = (wanted - got).mean(0)  # makes the mean output what the float model's is
        quality = sqnr(wanted, got + correction)
        bias = correction if bias is None else bias + correction
    else:
        bias = grid.change.bias(weight, bias)
    spec = LinearSpec(codes.to(torch.int8), steps, grid, bias)
    return QuantLinear.from_spec(spec, backend), quality


def input_grid(site: Site, change: Change, fmt: Format | None, recipe: Recipe) -> InputGrid:
    """How the site's input is quantized."""
    grid = InputGrid(fmt, change)
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


def quantize_outside(module: nn.Module, scheme: Scheme, backend: str) -> Quantized:
    """A head, an embedding or a patch embedding; inputs are dynamic per token, not calibrated."""
    assert scheme.w is not None and isinstance(module, (nn.Linear, nn.Embedding, nn.Conv2d))
    problem = Problem(module.weight.float().flatten(1), scheme.w)
    codes, steps = load("round", "nearest").find(problem)
    codes = codes.to(torch.int8)
    if isinstance(module, nn.Embedding):
        return QuantEmbedding.from_codes(codes, steps, module.weight.dtype)
    if isinstance(module, nn.Conv2d) and not QuantPatchConv.fits(module):
        raise ModelError(f"{module}: only convolutions that cut patches can be quantized")
    a = scheme.a and Format(scheme.a.bits, granularity="token")
    bias = None if module.bias is None else module.bias.float()
    linear = QuantLinear.from_spec(LinearSpec(codes, steps, InputGrid(a), bias), backend)
    if isinstance(module, nn.Conv2d):
        return QuantPatchConv(linear, module.kernel_size, module.weight.dtype)
    return linear


def transform_of(recipe: Recipe) -> ModuleType | None:
    return None if recipe.method is None else load("transform", recipe.method)


def _change(site: Site, scheme: Scheme, recipe: Recipe) -> Change:
    transform = transform_of(recipe)
    if transform is None:
        return Change()
    return transform.find(site, scheme).simplest()


def rounded_to_nearest(
    site: Site, schemes: dict[str, Scheme], recipe: Recipe, backend: str
) -> Iterator[tuple[str, QuantLinear]]:
    """The linears of one site as they would be, rounded to nearest: a first look."""
    quick = replace(recipe, rounding="nearest")
    for scheme, part in by_scheme(site, schemes):
        if scheme.w is not None:
            for name, linear, _ in quantize_site(part, scheme, quick, backend):
                yield name, linear
