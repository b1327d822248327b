"""Which module becomes what: the patterns that users give, against the names in a model."""

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from qtk.errors import SchemeError
from qtk.models import Block
from qtk.observe import Site
from qtk.pipeline.recipes import Choice
from qtk.scheme import Scheme


@dataclass(frozen=True)
class Assignment:
    """What every module becomes, by full name.

    Attributes:
        inside: every linear of the blocks; those without a weight's grid stay as they are.
        outside: heads, poolers, embeddings and patch embeddings that were asked for.
    """

    inside: dict[str, Choice]
    outside: dict[str, Choice]

    @property
    def quantized(self) -> dict[str, Choice]:
        """The linears of the blocks that are not left in floating point."""
        return {n: choice for n, choice in self.inside.items() if choice.scheme.w is not None}

    def parts(self, site: Site) -> Iterator[tuple[Choice, Site]]:
        """The site in parts, those of its linears together that become the same."""
        for choice in dict.fromkeys(self.quantized.get(name) for name in site.linears):
            if choice is not None:
                same = {n: m for n, m in site.linears.items() if self.inside[n] == choice}
                yield choice, replace(site, linears=same)


def assign(
    model: nn.Module, blocks: Sequence[Block], default: Choice, overrides: Mapping[str, Choice]
) -> Assignment:
    """The first pattern that matches wins.

    Raises:
        SchemeError: a pattern that matches nothing, a table that another layer shares, or groups
            longer than any row.
    """
    names = [n for block in blocks for group in block.groups for n in group.linears]

    def choice(name: str) -> Choice:
        asked = next((c for p, c in overrides.items() if fnmatch.fnmatch(name, p)), default)
        return _suited(name, model.get_submodule(name), asked)

    inside = {name: choice(name) for name in names}
    found = Assignment(inside, _outside(model, names, overrides))
    return _fitted(model, found)


def _suited(name: str, module: nn.Module, choice: Choice) -> Choice:
    """What a convolution can be: it has no change of variable, as its windows overlap; a grouped
    one computes in floating point, each filter rounded to nearest.

    Raises:
        SchemeError: a grouped one in FP8, or by a rounder that must see what it reads.
    """
    if not isinstance(module, nn.Conv2d) or choice.scheme.w is None:
        return choice
    recipe = choice.recipe.without_transform()
    if module.groups == 1:
        return replace(choice, recipe=recipe)
    if choice.scheme.w.kind != "int":
        raise SchemeError(f"{name}: a grouped convolution has no FP8; skip=[{name!r}], or w=8")
    if recipe.rounder.needs_calib:
        raise SchemeError(
            f"{name}: a grouped convolution is rounded to nearest, rounding="
            f"{recipe.rounder.name!r} is not for it; skip=[{name!r}]"
        )
    return Choice(Scheme(choice.scheme.w, None), recipe.quick())


def _outside(
    model: nn.Module, inside: Sequence[str], overrides: Mapping[str, Choice]
) -> dict[str, Choice]:
    """What a pattern names which fits no linear of the blocks."""
    outside = {
        n: m
        for n, m in model.named_modules()
        if n not in inside and (isinstance(m, nn.Linear) or type(m) in (nn.Embedding, nn.Conv2d))
    }
    found: dict[str, Choice] = {}
    for pattern, choice in overrides.items():
        if any(fnmatch.fnmatch(name, pattern) for name in inside):
            continue
        matched = [name for name in outside if fnmatch.fnmatch(name, pattern)]
        if not matched:
            raise SchemeError(
                f"pattern {pattern!r} matches no linear of the blocks, such as {inside[0]!r}, and "
                f"nothing else that can be quantized: {', '.join(outside)}"
            )
        for name in matched:
            shared = [n for n, m in outside.items() if m.weight is outside[name].weight]
            if choice.scheme.w is not None and len(shared) > 1:
                raise SchemeError(f"{' and '.join(shared)} share one weight: they stay float")
            found.setdefault(name, _suited(name, outside[name], choice))
    return {name: choice for name, choice in found.items() if choice.scheme.w is not None}


def _fitted(model: nn.Module, found: Assignment) -> Assignment:
    """Groups that are longer than a layer's rows are its rows."""
    every = {**found.quantized, **found.outside}
    weights: dict[str, Any] = {name: model.get_submodule(name).weight for name in every}
    rows = {name: weight[0].numel() for name, weight in weights.items()}
    sizes = {n: c.scheme.w.group_size for n, c in every.items() if c.scheme.w is not None}
    for size in {size for size in sizes.values() if size is not None}:
        longest = max(rows[n] for n in every if sizes[n] == size)
        if size > longest:
            raise SchemeError(
                f"group_size={size}: the longest row that it is for has {longest} weights; leave "
                "it out for one scale per row"
            )

    def fitted(name: str, choice: Choice) -> Choice:
        w = choice.scheme.w
        if w is None or w.group_size is None or w.group_size <= rows[name]:
            return choice
        row = replace(w, granularity="channel", group_size=None)
        return replace(choice, scheme=Scheme(row, choice.scheme.a))

    inside, outside = (
        {n: fitted(n, c) for n, c in d.items()} for d in (found.inside, found.outside)
    )
    return Assignment(inside, outside)
