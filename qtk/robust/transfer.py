"""Precision transfer: what is crafted at one number of bits, answered at another.

Double-Win Quant (Fu et al. 2021, ICML) prints this matrix for adversarially trained networks. Its
attack stops at what is wrong already at its own precision, which leaves those images just behind
that precision's boundary and flatters the others; here every step is taken, and stopping is an
option, to see by how much.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Generator, Tensor, nn

from qtk.errors import SchemeError
from qtk.intervals import wilson
from qtk.report import plots
from qtk.robust.ball import cross_entropy, gradient, into_linf, uniform
from qtk.robust.images import Images, Normalize, Pixels, frozen
from qtk.robust.study import drawn, right
from qtk.table import finite, ruled

ADAPTIVE, OBLIVIOUS, CLEAN = "all", "drawn", "clean"
DRAWS = 10  # of the defender, whose mean and spread are the figure


class Switching(Protocol):
    """A model that answers at bits of one's choice, or at drawn ones: `qtk.random_precision`'s, or
    what `qtk.random_precision_training` has trained."""

    bits: tuple[int, ...]

    def switch(self, bits: int) -> None: ...
    def reseed(self, seed: int) -> None: ...
    def at(self, bits: int, **batch: Any) -> Tensor: ...
    def __call__(self, **batch: Any) -> Any: ...


@dataclass(frozen=True)
class Transfer:
    """Accuracy by who attacks and who answers.

    Attributes:
        attacks: bits that are attacked, then "drawn" (an attacker who draws bits anew for every
            step, and does not know the defender's) and "all" (who averages the gradient over all
            bits); "clean" before them, who does nothing.
        bits: that answer.
        accuracy: a row an attack, a column for each of `bits`, shares.
        drawn: a row an attack: mean of the defender's draws, and its standard deviation.
        intervals: a row an attack: Wilson's of that mean, 95 %.
    """

    attacks: tuple[str, ...]
    bits: tuple[int, ...]
    accuracy: tuple[tuple[float, ...], ...]
    drawn: tuple[tuple[float, float], ...]
    intervals: tuple[tuple[float, float], ...]
    samples: int
    budget: float
    steps: int
    early_stop: bool
    seed: int

    @property
    def best_fixed(self) -> int:
        """The bits that are most often right under the attack made for them."""
        own = {b: self.accuracy[self.attacks.index(f"{b}")][i] for i, b in enumerate(self.bits)}
        return max(own, key=lambda b: own[b])

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return finite({**asdict(self), "best_fixed": self.best_fixed})

    def table(self) -> str:
        """Rows attack, columns answer; per cent."""
        head = ["attacked at", *(f"{b} bits" for b in self.bits), "drawn", "std", "95 %"]
        rows = [
            [name, *(f"{100 * v:.1f}" for v in self.accuracy[i]), f"{100 * self.drawn[i][0]:.1f}",
             f"{100 * self.drawn[i][1]:.1f}",
             f"{100 * self.intervals[i][0]:.1f} to {100 * self.intervals[i][1]:.1f}"]
            for i, name in enumerate(self.attacks)
        ]  # fmt: skip
        return "\n".join(ruled(head, rows))

    def plot(self, path: str | Path | None = None) -> str:
        """Who attacks from above to below, who answers from left to right, right in per cent: SVG,
        written to `path`, if given."""
        shares = [
            [*fixed, mean] for fixed, (mean, _) in zip(self.accuracy, self.drawn, strict=True)
        ]
        answers = [*(f"{b} bits" for b in self.bits), "drawn"]
        svg = plots.matrix(self.attacks, answers, shares, "attacked at", "answered at")
        if path is not None:
            Path(path).write_text(svg, encoding="utf-8")
        return svg


def precision_transfer(
    model: Any, pixels: Tensor, labels: Tensor, *, normalize: Normalize, budget: float = 8 / 255,
    steps: int = 20, early_stop: bool = False, batch_size: int = 64, seed: int = 0,
) -> Transfer:  # fmt: skip
    """PGD at every precision, answered at every precision and at drawn ones.

    Args:
        model: see `Switching`.
        pixels: [N, C, H, W] in [0, 1]; `labels` [N].
        normalize: mean and std a channel, of what the model reads.
        budget: linf.
        early_stop: leaves an image alone once it is wrong at the attack's own bits.
        seed: of random starts and of both sides' draws, which come from different generators.

    Raises:
        SchemeError: no steps, or a budget that is not above zero.
    """
    if steps < 1 or not budget > 0:
        raise SchemeError(f"budget={budget}, steps={steps}: give numbers above zero")
    mean, std = (tuple(float(v) for v in values) for values in normalize)
    bits, images = tuple(model.bits), Images(pixels, labels, mean, std)
    accuracy, means, intervals = [], [], []
    attacks = (CLEAN, *(f"{b}" for b in bits), OBLIVIOUS, ADAPTIVE)
    with frozen(model):
        for attack in attacks:
            target = Pixels(_Attacked(model, attack, seed), images.mean, images.std)
            generator = drawn(seed, "transfer")
            x = images.pixels if attack == CLEAN else torch.cat([
                _pgd(target, a, y, budget, steps, generator, early_stop)
                for a, y in zip(images.pixels.split(batch_size), labels.split(batch_size),
                                strict=True)
            ])  # fmt: skip
            fixed = [_answers(model, images, x, f"{b}", batch_size, seed) for b in bits]
            several = [
                _answers(model, images, x, OBLIVIOUS, batch_size, seed + 1 + k)
                for k in range(DRAWS)
            ]
            average = float(np.mean(several))
            accuracy.append(tuple(fixed))
            means.append((average, float(np.std(several))))
            intervals.append(wilson(round(average * len(labels)), len(labels)))
    return Transfer(attacks, bits, tuple(accuracy), tuple(means), tuple(intervals), len(labels),
                    budget, steps, early_stop, seed)  # fmt: skip


class _Attacked(nn.Module):
    """The model as an attacker sees it: at his bits, at bits that he draws, or at all of them."""

    def __init__(self, model: Any, how: str, seed: int) -> None:
        super().__init__()
        self._held, self.how = (model,), how
        self.generator = drawn(seed, "attacker")
        self.parameters = model.parameters  # type: ignore[method-assign]

    def forward(self, pixel_values: Tensor) -> Any:
        model = self._held[0]
        if self.how == ADAPTIVE:
            found = torch.stack([model.at(b, pixel_values=pixel_values) for b in model.bits])
            return SimpleNamespace(logits=found.mean(0))
        if self.how in (OBLIVIOUS, CLEAN):
            place = int(torch.randint(len(model.bits), (1,), generator=self.generator))
            return SimpleNamespace(logits=model.at(model.bits[place], pixel_values=pixel_values))
        return SimpleNamespace(logits=model.at(int(self.how), pixel_values=pixel_values))


def _pgd(
    model: nn.Module, x: Tensor, y: Tensor, budget: float, steps: int, generator: Generator,
    early_stop: bool,
) -> Tensor:  # fmt: skip
    """PGD in the linf ball, steps of 2.5 budget / steps."""
    moved = into_linf(x + budget * (2 * uniform(x, generator) - 1), x, budget)
    for _ in range(steps):
        _, logits, grad = gradient(model, moved, lambda z: cross_entropy(z, y))
        further = into_linf(moved + 2.5 * budget / steps * grad.sign(), x, budget)
        if early_stop:
            further = torch.where((logits.argmax(-1) == y).view(-1, 1, 1, 1), further, moved)
        moved = further
    return moved


def _answers(model: Any, images: Images, x: Tensor, how: str, batch_size: int, seed: int) -> float:
    """Share that is right: at given bits, or each image at drawn ones."""
    if how == OBLIVIOUS:
        model.reseed(seed)
        reader = Pixels(model, images.mean, images.std)
    else:
        reader = Pixels(_Attacked(model, how, seed), images.mean, images.std)
    return float(right(reader, x, images.labels, batch_size).mean())
