"""Attacks on a float and on quantized models, sample by sample.

An attack is crafted on one model, its maker, with gradients; its images are answered with gradients
off by the maker and by those that it is to transfer to.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Generator, Tensor, nn

from qtk import integrity
from qtk.robust.cells import RIGHT, UNSEEN, Bits, Cells, Found
from qtk.robust.images import Images
from qtk.robust.result import UNROUNDED
from qtk.robust.suite import Part

FLOAT, QUANTIZED, SECOND, ADAPTIVE = "float", "quantized", "second", "adaptive"
HEARERS = {  # who answers what was crafted on whom
    FLOAT: (FLOAT, QUANTIZED, SECOND), QUANTIZED: (QUANTIZED, FLOAT), SECOND: (SECOND,),
    ADAPTIVE: (QUANTIZED,),
}  # fmt: skip
ALONE = "alone"  # the answers of one model, whatever its role
SLACK = 1e-4  # of 1/255: float32 knows no budget exactly


@dataclass(frozen=True)
class Heard:
    """Who is right, by role, under one corruption or noise; see `Row` for the names."""

    name: str
    kind: str
    level: str
    budget: float | None
    found: Found


@dataclass(frozen=True)
class Study:
    """What attacks are run on.

    Attributes:
        models: by role, each [B, C, H, W] in [0, 1] -> logits.
        say: called with what is about to be done.
    """

    images: Images
    models: Mapping[str, nn.Module]
    cells: Cells
    steps: int
    batch_size: int
    seed: int
    say: Callable[[str], None]

    @property
    def roles(self) -> list[str]:
        """Those that answer; the adaptive one is only attacked."""
        return [role for role in self.models if role != ADAPTIVE]

    def right(self, role: str, pixels: Tensor, labels: Tensor | None = None) -> Bits:
        """[N], answered without gradients."""
        labels = self.images.labels if labels is None else labels
        reseed(self.models[role], self.seed, "defender")
        return right(self.models[role], pixels, labels, self.batch_size)

    def clean(self) -> Found:
        """Every role on clean images."""
        self.say("clean images")
        return self.heard({"part": "clean"}, lambda role: self.right(role, self.images.pixels))

    def heard(self, facts: Mapping[str, object], answers: Callable[[str], Bits]) -> Found:
        """What each role answers, kept by model: studies of one float model share its answers."""

        def alone(role: str) -> Found:
            return {ALONE: answers(role)}

        return {r: self.cells.of(r).get(facts, partial(alone, r))[ALONE] for r in self.roles}

    def attack(
        self, part: Part, level: str, maker: str, steps: int | None = None,
        after: Found | None = None,
    ) -> Found:  # fmt: skip
        """Who is right on what `part` crafts on `maker`, by who answers, rounded and not.

        Images that no model has right on clean data are not attacked: they count as wrong anyway.

        Args:
            after: of an attack before this one; what it has wrong in every answer is spared, and
                what it has wrong is wrong here, too.
        """
        steps = self.steps if steps is None else steps
        reseed(self.models[maker], self.seed, "attacker")
        budget = part.budgets[level]
        facts = {"part": part.name, "budget": budget, "maker": maker, "steps": steps}
        self.say(f"{part.name} {level} on {maker}")
        if part.is_universal:
            return self.cells.get(facts, lambda: self._universal(part, budget, maker, steps))
        standing = _standing(self.clean())
        if after is not None:
            facts["after"] = True
            unrounded = {k: v for k, v in after.items() if k.startswith(UNROUNDED)}
            standing &= _standing(unrounded if part.vanishes(level) else after)
        chosen = np.flatnonzero(standing)
        found = self.cells.get(facts, lambda: self._single(part, budget, maker, steps, chosen))
        return found if after is None else {key: bits & after[key] for key, bits in found.items()}

    def _single(
        self, part: Part, budget: float, maker: str, steps: int, chosen: np.ndarray
    ) -> Found:
        x, y = self.images.pixels[chosen], self.images.labels[chosen]
        generator = drawn(self.seed, part.name, budget)
        found = [
            part.module.perturb(self.models[maker], a, b, budget, generator, steps)
            for a, b in zip(x.split(self.batch_size), y.split(self.batch_size), strict=True)
        ] if len(x) else [x]  # fmt: skip
        return self._heard(maker, torch.cat(found), x, y, chosen, self.clean())

    def _universal(self, part: Part, budget: float, maker: str, steps: int) -> Found:
        """Learned on the first half of the images, judged on the second."""
        clean, half = self.clean(), len(self.images.labels) // 2
        x, y = self.images.pixels, self.images.labels
        generator = drawn(self.seed, part.name, budget)
        patch = part.module.learn(self.models[maker], x[:half], y[:half], budget, generator, steps)
        x, y = x[half:], y[half:]
        shown = part.module.apply(patch, x, generator)
        found = self._heard(maker, shown, x, y, np.arange(half, half + len(y)), clean)
        for bits in found.values():
            bits[:half] = UNSEEN
        return found

    def _heard(
        self, maker: str, adversarial: Tensor, x: Tensor, y: Tensor, chosen: np.ndarray,
        clean: Found,
    ) -> Found:  # fmt: skip
        """Rounded to integers as a picture file would be, and as it is."""
        found = {}
        for prefix, pixels in (("", rounded(adversarial, x)), (UNROUNDED, adversarial)):
            for role in HEARERS[maker]:
                if role in self.models:
                    bits = np.zeros(len(self.images.labels), np.int8)
                    unmoved = torch.equal(pixels, x)
                    bits[chosen] = 1 if unmoved else self.right(role, pixels, y)
                    found[prefix + role] = bits & clean[role]
        return found


def _standing(found: Found) -> np.ndarray:
    """[N] bool: what some model has right."""
    standing: np.ndarray = np.stack(list(found.values())).max(0) == RIGHT
    return standing


@torch.no_grad()
def right(model: nn.Module, pixels: Tensor, labels: Tensor, batch_size: int) -> Bits:
    """[N] int8: 1 where the model's answer is the label."""
    found = [
        model(x).argmax(-1).cpu() == y
        for x, y in zip(pixels.split(batch_size), labels.split(batch_size), strict=True)
    ]
    return torch.cat(found).to(torch.int8).numpy() if found else np.zeros(0, np.int8)


def rounded(adversarial: Tensor, x: Tensor) -> Tensor:
    """Differences cut to whole steps of 1/255, towards the image: the budget is kept."""
    steps = (adversarial - x) * 255
    return (x + torch.trunc(steps + SLACK * steps.sign()) / 255).clamp(0, 1)


def drawn(*facts: object) -> Generator:
    """Random numbers that depend on the facts alone."""
    return Generator().manual_seed(int(integrity.digest(*facts)[:15], 16))


def reseed(model: nn.Module, *facts: object) -> None:
    """Begins the draws of a model of random precision anew; attacker and defender draw apart."""
    for held in getattr(model, "_held", ()):
        if hasattr(held, "reseed"):
            held.reseed(int(integrity.digest(*facts)[:15], 16))


def makers(models: Mapping[str, nn.Module]) -> Iterator[str]:
    """The roles that attacks are crafted on, in order."""
    return (role for role in (FLOAT, QUANTIZED, ADAPTIVE, SECOND) if role in models)
