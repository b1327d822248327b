"""Which module gets which scheme: the patterns that users give, against the names in a model."""

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from torch import nn

from qtk.errors import SchemeError
from qtk.models import Block
from qtk.observe import Site
from qtk.scheme import Scheme


def special_schemes(
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
    if not isinstance(skip, Sequence) or not all(isinstance(p, str) for p in [*bits, *skip]):
        raise SchemeError(f"skip={skip!r}, bits={bits!r}: patterns of module names are strings")
    left_out = dict.fromkeys(skip, Scheme(None, None))
    chosen = {pattern: scheme_of(*pair) for pattern, pair in bits.items() if pattern not in skip}
    return {**left_out, **chosen}


def assign(
    blocks: Sequence[Block], default: Scheme, special: Mapping[str, Scheme]
) -> dict[str, Scheme]:
    """The scheme of every linear in the blocks; the first pattern that matches wins.

    Raises:
        SchemeError: a pattern that matches nothing, or nothing left to quantize.
    """
    names = [n for block in blocks for group in block.groups for n in group.linears]

    def scheme(name: str) -> Scheme:
        return next((s for p, s in special.items() if fnmatch.fnmatch(name, p)), default)

    return {name: scheme(name) for name in names}


def asked_for(
    model: nn.Module, blocks: Sequence[Block], special: dict[str, Scheme]
) -> dict[str, Scheme]:
    """Heads, poolers and embeddings: those that a pattern names which fits no linear of the blocks.

    Raises:
        SchemeError: a pattern that matches nothing, or a table that another layer shares.
    """
    inside = [n for block in blocks for group in block.groups for n in group.linears]
    outside = {
        n: m
        for n, m in model.named_modules()
        if n not in inside and (isinstance(m, nn.Linear) or type(m) in (nn.Embedding, nn.Conv2d))
    }
    found: dict[str, Scheme] = {}
    for pattern, scheme in special.items():
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
            if scheme.w is not None and len(shared) > 1:
                raise SchemeError(f"{' and '.join(shared)} share one weight: they stay float")
            found.setdefault(name, scheme)
    return {name: scheme for name, scheme in found.items() if scheme.w is not None}


def by_scheme(site: Site, schemes: dict[str, Scheme]) -> Iterator[tuple[Scheme, Site]]:
    """The site in parts, those of its linears together that have the same scheme."""
    for scheme in dict.fromkeys(schemes[name] for name in site.linears):
        same = {n: linear for n, linear in site.linears.items() if schemes[n] == scheme}
        yield scheme, replace(site, linears=same)
