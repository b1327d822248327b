"""Where an activation grid ends; one file a rule.

A rule is a function `find(question) -> Range`, with settings as keywords: two ends for a static
grid, a share of every token's maximum for a dynamic one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qtk import discover
from qtk.errors import SchemeError
from qtk.scheme import Format


class Probe(Protocol):
    """Carries errors through the rest of a block (`qtk.observe.probe.Probe`).

    `inputs` are the transformed [B, T, K] of its parts.
    """

    inputs: list[Tensor]

    def effect(self, index: int, errors: Tensor, granularity: str) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Question:
    """The input of one site, and what errors in it cost.

    Attributes:
        batches: [M, K] float32, the transformed input, a tensor a batch.
        fmt: the grid; its granularity is "tensor" or "token".
        importance: [K] float32, what an error of each channel costs at the output (sum of W'^2).
        probe: for rules that need one.
    """

    batches: list[Tensor]
    fmt: Format
    importance: Tensor
    probe: Probe | None = None

    @property
    def per_token(self) -> bool:
        return self.fmt.granularity == "token"


@dataclass(frozen=True)
class Range:
    """Where the grid ends.

    Attributes:
        lo, hi: scalars, of a static grid.
        clip: share of a token's maximum in (0, 1], of a dynamic one.
    """

    lo: Tensor | None = None
    hi: Tensor | None = None
    clip: float = 1.0

    @property
    def ends(self) -> tuple[Tensor, Tensor]:
        assert self.lo is not None and self.hi is not None
        return self.lo, self.hi


class Rule(Protocol):
    """What a file in this folder is, and a module or object of a user's.

    Optional members:
        TOKENS: whether it answers for dynamic grids too; False if not said.
        NEEDS_PROBE: whether `question.probe` must be there, which takes the gradients of the whole
            float model; False if not said.
    """

    def find(self, question: Question) -> Range: ...


@dataclass(frozen=True)
class CheckedRule:
    """A rule whose answers are checked."""

    name: str
    rule: Callable[[Question], Range]
    tokens: bool
    needs_probe: bool

    def find(self, question: Question) -> Range:
        """The rule's answer.

        Raises:
            SchemeError: it is none, ends that are not finite or the wrong way round, a clip outside
                (0, 1].
        """
        answer = self.rule(question)
        if not isinstance(answer, Range):
            raise SchemeError(f"ranges={self.name!r} gave {_kind(answer)}; it must give a Range")
        if question.per_token:
            if not isinstance(answer.clip, (int, float)) or not 0 < answer.clip <= 1:
                raise SchemeError(f"ranges={self.name!r} gave clip={answer.clip!r}, not in (0, 1]")
            return answer
        for end in (answer.lo, answer.hi):
            if not isinstance(end, Tensor) or end.dim() != 0 or not torch.isfinite(end):
                raise SchemeError(
                    f"ranges={self.name!r} gave an end {end!r}; lo and hi must be finite scalars"
                )
        lo, hi = answer.ends
        if lo > hi:
            raise SchemeError(f"ranges={self.name!r} gave lo={float(lo)} above hi={float(hi)}")
        return answer


def rule_of(given: object) -> CheckedRule:
    """A rule by name, or a user's own."""
    part = discover.part("ranges", given)
    tokens, needs_probe = (bool(part.member(n, False)) for n in ("TOKENS", "NEEDS_PROBE"))
    return CheckedRule(part.name, part.find, tokens, needs_probe)


def clip_tokens() -> list[str]:
    """Names of the rules here that answer for dynamic grids."""
    return [name for name in discover.available("ranges") if rule_of(name).tokens]


def _kind(value: object) -> str:
    return f"a {type(value).__name__}"
