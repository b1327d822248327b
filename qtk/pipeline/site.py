"""One site at a time: transform, input grid, codes, bias, and the integer linear made of them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qtk import ranks
from qtk.errors import ModelError
from qtk.grids import Change, InputGrid, LinearSpec, Steps
from qtk.modules.base import Quantized
from qtk.modules.conv import QuantConv2d
from qtk.modules.embedding import QuantEmbedding
from qtk.modules.linear import QuantLinear
from qtk.numerics import decibels, scale_and_zero_point
from qtk.observe import Site
from qtk.pipeline.assign import Assignment
from qtk.pipeline.recipes import Choice
from qtk.ranges import CheckedRule, Question
from qtk.record import Layer, LayerRecipe
from qtk.round import Problem, Report, Rounded, rounder_of
from qtk.scheme import Format, Scheme

CHANNELS = 96  # compared with the float model at a time; usual widths are multiples of it
ALONE = LayerRecipe("none", "nearest", None)


def quantize_site(
    model: nn.Module, site: Site, choice: Choice, backend: str, report: Report
) -> dict[str, Layer]:
    """Replaces the linears of one site by integer ones, in place; says of each how it was made.

    Args:
        report: shows how far a long fit is.
    """
    made = {}
    for name, spec, made[name] in quantized(site, choice, report):
        model.set_submodule(name, _layer(spec, site.linears[name], backend))
    return made


def _layer(spec: LinearSpec, module: nn.Module, backend: str) -> QuantLinear | QuantConv2d:
    """What computes in the place of a linear or a convolution."""
    if isinstance(module, nn.Conv2d):
        return QuantConv2d.from_spec(spec, module, backend)
    return QuantLinear.from_spec(spec, backend)


def quantized(
    site: Site, choice: Choice, report: Report | None = None
) -> Iterator[tuple[str, LinearSpec, Layer]]:
    """The linears of one site by name, as values, and how each was made."""
    change = choice.recipe.transform.find(site, choice.scheme)
    grid, rule = input_grid(site, change, choice)
    inputs = grid.fake_quantize(site.rows) if site.has_data else None  # [T, K]
    changed = change.rotation or change.shift is not None or site.group.rotated
    recipe = LayerRecipe(
        choice.recipe.method if changed else "none",
        choice.recipe.rounder.runs(inputs is not None), None if rule is None else rule.name,
    )  # fmt: skip
    task = Task(site.float_rows, change, grid, inputs, choice, site.curvatures, report)
    for name, (spec, quality) in _shared_out(task, site.linears):
        yield name, spec, Layer(
            choice.scheme, spec.bias is not None, change.shift is not None, change.rotation,
            quality, recipe,
        )  # fmt: skip


@dataclass(frozen=True)
class Task:
    """What the linears of one site have in common when they are rounded.

    Attributes:
        floats: [T, K], what they read in the float model; empty without data.
        inputs: [T, K], what they will read, on its grid; None without data.
        curvatures: of the site.
        report: shows how far a long fit is.
    """

    floats: Tensor
    change: Change
    grid: InputGrid
    inputs: Tensor | None
    choice: Choice
    curvatures: Callable[[], dict[str, Tensor]] | None = None
    report: Report | None = None


def _shared_out(
    task: Task, linears: Mapping[str, nn.Linear | nn.Conv2d]
) -> Iterator[tuple[str, tuple[LinearSpec, float | None]]]:
    """The linears, quantized: rounded by rows or one by one, each as the ranks share them out."""
    weights = {name: linear.weight.detach().flatten(1) for name, linear in linears.items()}
    if task.choice.recipe.rounder.rows_apart:
        every = [_rounded_by_rows(task, name, weight) for name, weight in weights.items()]
    else:
        every = ranks.spread(lambda name: rounded(task, name, weights[name]), [*weights])
    found = dict(zip(weights, every, strict=True))
    fits = [fitted(task, weight, found[name]) for name, weight in weights.items()]
    for (name, linear), (missed, quality) in zip(linears.items(), fits, strict=True):
        yield name, (finished(task, name, linear, found[name], missed), quality)


def _rounded_by_rows(task: Task, name: str, weight: Tensor) -> Rounded:
    parts = ranks.spread(partial(rounded, task, name), weight.tensor_split(ranks.world()))
    codes, steps = zip(*parts, strict=True)
    zeros = [part.zero_point for part in steps if part.zero_point is not None]
    scale = torch.cat([part.scale for part in steps])
    return Rounded(
        torch.cat(codes), Steps(steps[0].fmt, scale, torch.cat(zeros) if zeros else None)
    )


def rounded(task: Task, name: str, weight: Tensor) -> Rounded:
    """The codes and steps of a weight [N, K], or of some of its rows."""
    assert task.choice.scheme.w is not None
    weight = weight.float()
    wanted = task.floats @ weight.T if len(task.floats) else None  # [T, N]
    problem = Problem(task.change.weight(weight), task.choice.scheme.w, task.inputs, wanted, name)
    if task.curvatures is not None:
        curvatures = task.curvatures
        problem = replace(problem, curvature=lambda: curvatures()[name])
    if task.report is not None:
        problem = replace(problem, report=task.report)
    return task.choice.recipe.rounder.find(problem)


def fitted(task: Task, weight: Tensor, found: Rounded) -> tuple[Tensor | None, float | None]:
    """What the bias needs so that the mean output is the float model's [N], and the SQNR then.

    A few output channels at a time, which the ranks share out: always the same ones, because sums
    over another number of rows come out some ulps apart, and others read what is made here.
    """
    if task.inputs is None or not len(task.floats):
        return None, None
    parts = ranks.spread(
        lambda start: _fit(task, weight, found, slice(start, start + CHANNELS)),
        range(0, len(weight), CHANNELS),
    )
    missed, signal, noise = zip(*parts, strict=True)
    return torch.cat(missed), decibels(sum(signal), sum(noise))


def _fit(task: Task, weight: Tensor, found: Rounded, rows: slice) -> tuple[Tensor, float, float]:
    """The mean error of some output channels, the energy of their outputs and of what is left."""
    assert task.inputs is not None
    steps = found.steps.rows(rows)
    wanted = task.floats @ weight[rows].float().T
    error = wanted - task.inputs @ steps.dequantize(found.codes[rows]).T
    missed = error.mean(0)
    left = error - missed
    energies = [float(x.double().square().sum()) for x in (wanted, left)]
    return missed, energies[0], energies[1]


def finished(
    task: Task, name: str, linear: nn.Linear | nn.Conv2d, found: Rounded, missed: Tensor | None
) -> LinearSpec:
    """The layer as a value, its bias corrected."""
    bias: Tensor | None = None if linear.bias is None else linear.bias.float()
    if missed is None:
        bias = task.change.bias(linear.weight.flatten(1).float(), bias)
    else:
        bias = missed if bias is None else bias + missed
    spec = LinearSpec(found.codes.to(torch.int8), found.steps, task.grid, bias)
    _check_finite(name, spec)
    return spec


def input_grid(site: Site, change: Change, choice: Choice) -> tuple[InputGrid, CheckedRule | None]:
    """How the site's input is quantized, and the rule that ended the grid, if one did."""
    fmt = choice.scheme.a
    grid = InputGrid(fmt, change)
    if fmt is None or fmt.kind != "int" or not site.has_data:
        return grid, None
    rule = choice.recipe.rule_for(
        site.group.norm is not None, change.rotation or site.group.rotated
    )
    question = Question(
        batches=[change.inputs(x[mask]) for x, mask in site.sequences],
        fmt=fmt,
        importance=change.weight(site.weight()).square().sum(0),  # [K]
        probe=site.probe and site.probe.changed(change.inputs, change.weight),
    )
    found = rule.find(question)
    if question.per_token:
        return replace(grid, clip=found.clip), rule
    scale, zero_point = scale_and_zero_point(*found.ends, fmt)
    return replace(grid, scale=scale, zero_point=zero_point), rule


def rounded_to_nearest(
    site: Site, found: Assignment, backend: str
) -> Iterator[tuple[str, QuantLinear]]:
    """The linears of one site as they would be, rounded to nearest: a first look."""
    for choice, part in found.parts(site):
        quick = replace(choice, recipe=choice.recipe.quick())
        for name, spec, _ in quantized(part, quick):
            yield name, QuantLinear.from_spec(spec, backend)


def quantize_outside(
    model: nn.Module, outside: Mapping[str, Choice], backend: str
) -> dict[str, Layer]:
    """Replaces heads, embeddings and patch embeddings, in place; says of each how it was made."""
    made = {}
    for name, choice in outside.items():
        layer = _alone(name, model.get_submodule(name), choice.scheme, backend)
        model.set_submodule(name, layer)
        inner = layer.linear if isinstance(layer, QuantConv2d) else layer
        bias = isinstance(inner, QuantLinear) and inner.bias is not None
        made[name] = Layer(layer.scheme, bias, transform=False, recipe=ALONE)
    return made


def _alone(name: str, module: nn.Module, scheme: Scheme, backend: str) -> Quantized:
    """What stands for a module outside the blocks; inputs are dynamic per token, not calibrated."""
    assert scheme.w is not None and isinstance(module, (nn.Linear, nn.Embedding, nn.Conv2d))
    problem = Problem(module.weight.float().flatten(1), scheme.w, name=name)
    codes, steps = rounder_of("nearest").find(problem)
    codes = codes.to(torch.int8)
    if isinstance(module, nn.Embedding):
        return QuantEmbedding.from_codes(codes, steps, module.weight.dtype)
    a = scheme.a and Format(scheme.a.bits, granularity="token", kind=scheme.a.kind)
    bias = None if module.bias is None else module.bias.float()
    spec = LinearSpec(codes, steps, InputGrid(a), bias)
    _check_finite(name, spec)
    return _layer(spec, module, backend)


def _check_finite(name: str, value: Any) -> None:
    """Raises ModelError where a number of the layer overflowed."""
    for field in fields(value):
        part = getattr(value, field.name)
        if is_dataclass(part):
            _check_finite(f"{name}, {field.name}", part)
        elif isinstance(part, Tensor) and not torch.isfinite(part).all():
            raise ModelError(
                f"{name}: its {field.name} overflows once quantized; look for huge weights or "
                "biases"
            )
