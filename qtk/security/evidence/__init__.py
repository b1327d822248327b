"""What speaks for a backdoor that quantizing would wake, though nobody knows its trigger.

One file an evidence, `weigh(suspect) -> Evidence`. None needs labels, and none is a proof.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qtk.errors import ModelError
from qtk.security.minmax import Inputs, MinMax, logits_of, rounded

GRANULARITIES = ("channel", "tensor")
PATCHES = 3  # copies of every input with something at random in them
DRAWS = 8  # roundings at random
SIDES = (0.1, 0.3)  # of a square of pixels, as shares of the image's


@dataclass(frozen=True)
class Evidence:
    """One thing that was looked at.

    Attributes:
        name: of the file.
        number: what was measured.
        threshold: the largest that an innocent model has.
        sentence: what it means, for people.
        shown: the figures behind it, by name, for a plot.
        alone: whether it is enough where no other speaks.
    """

    name: str
    number: float
    threshold: float
    sentence: str
    shown: dict[str, list[float]] = field(default_factory=dict)
    alone: bool = False

    @property
    def speaks(self) -> bool:
        """Whether it speaks for a backdoor."""
        return self.number > self.threshold


@dataclass
class Suspect:
    """A float model, the width that it would be quantized to, and inputs to look at it with.

    Attributes:
        batches: inputs without labels.
        w: bits of the weights.
        seed: of what is drawn.
    """

    model: nn.Module
    batches: Sequence[Inputs]
    w: int
    seed: int = 0
    _rounded: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def generator(self) -> torch.Generator:
        """A new one each time, so that no evidence depends on who was asked before."""
        return torch.Generator().manual_seed(self.seed)

    @cached_property
    def inputs(self) -> list[Inputs]:
        """The batches, and each with random patches of pixels or random tokens: a patch that looks
        like the trigger half triggers it."""
        generator = self.generator()
        marked = [disturbed(x, generator) for _ in range(PATCHES) for x in self.batches]
        return [*self.batches, *marked]

    @cached_property
    def floats(self) -> Tensor:
        """[inputs, classes], the float model's logits."""
        return self.logits(self.model)

    @property
    def undisturbed(self) -> int:
        """How many of the inputs, the first ones, are as they were given."""
        return len(self.floats) // (1 + PATCHES)

    def nearest(self, per: str) -> Tensor:
        """[inputs, classes], those of the model with weights rounded to nearest."""
        name = f"nearest, per {per}"
        if name not in self._rounded:
            self._rounded[name] = self.logits(rounded(self.model, MinMax(self.w, per)))
        return self._rounded[name]

    def at_random(self, per: str) -> Tensor:
        """[draws, inputs, classes]: rounded up as often as a weight is near the code above."""
        name = f"at random, per {per}"
        if name not in self._rounded:
            by_chance = partial(_by_chance, MinMax(self.w, per), self.generator())
            drawn = [self.logits(rounded(self.model, by_chance)) for _ in range(DRAWS)]
            self._rounded[name] = torch.stack(drawn)
        return self._rounded[name]

    @torch.no_grad()
    def logits(self, model: nn.Module) -> Tensor:
        """[inputs, classes] float32.

        Raises:
            ModelError: the model is no classifier.
        """
        found = []
        for x in self.inputs:
            try:
                logits = logits_of(model, x)
            except AttributeError:
                logits = torch.empty(0)
            if logits.dim() != 2 or logits.shape[1] < 2:
                raise ModelError(
                    f"an audit looks at what a classifier answers, [B, classes]; "
                    f"{type(model).__name__} gives no such thing"
                )
            found.append(logits.float())
        return torch.cat(found)


def divergence(suspect: Suspect, logits: Tensor, which: slice = slice(None)) -> float:
    """Mean Kullback-Leibler divergence of some of the answers from the float model's, in nats."""
    mine, floats = logits[which].log_softmax(-1), suspect.floats[which].log_softmax(-1)
    return float(F.kl_div(mine, floats, log_target=True, reduction="batchmean"))


def _by_chance(quantizer: MinMax, generator: torch.Generator, weight: Tensor) -> Tensor:
    steps = quantizer.steps(weight)
    grid = steps.grid(weight[0].numel())
    chance = torch.rand(len(weight), weight[0].numel(), generator=generator).to(weight.device)
    levels = grid.clamp((weight.flatten(1).float() / grid.scale + chance).floor())
    return (levels * grid.scale).view_as(weight).to(weight.dtype)


def disturbed(x: Inputs, generator: torch.Generator) -> Inputs:
    """The same images each with a square of one colour somewhere, or texts with another token."""
    if isinstance(x, Mapping):
        if "input_ids" in x:
            return {**x, "input_ids": _with_a_token(x["input_ids"], generator)}
        name = next(name for name, value in x.items() if value.dim() == 4)
        return {**x, name: _with_squares(x[name], generator)}
    return _with_squares(x, generator) if x.dim() == 4 else x


def _with_squares(x: Tensor, generator: torch.Generator) -> Tensor:
    x, side = x.clone(), min(x.shape[-2:])
    lowest, highest = float(x.min()), float(x.max())
    for image in x:
        share = SIDES[0] + (SIDES[1] - SIDES[0]) * float(torch.rand((), generator=generator))
        size = max(1, round(share * side))
        top, left = (
            int(torch.randint(0, n - size + 1, (), generator=generator)) for n in x.shape[-2:]
        )
        colour = torch.rand(len(image), generator=generator) > 0.5
        values = torch.where(colour, highest, lowest).to(x)
        image[:, top : top + size, left : left + size] = values[:, None, None]
    return x


def _with_a_token(ids: Tensor, generator: torch.Generator) -> Tensor:
    ids = ids.clone()
    known = int(ids.max()) + 1
    for row in ids:
        place = int(torch.randint(1, max(2, len(row) - 1), (), generator=generator))
        row[place % len(row)] = int(torch.randint(0, known, (), generator=generator))
    return ids
