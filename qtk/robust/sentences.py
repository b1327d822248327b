"""Text attacks on a float and on quantized models, sentence by sentence."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from qtk import integrity
from qtk.observe.tokens import encode
from qtk.robust.cells import Bits, Cells, Found
from qtk.robust.result import UNROUNDED
from qtk.robust.study import HEARERS, drawn
from qtk.robust.suite import Part
from qtk.robust.texts import Sentences, Texts, embedded


@dataclass(frozen=True)
class TextStudy:
    """As `Study`, of sentences: embeddings are no integers, so that nothing is rounded."""

    texts: Texts
    models: Mapping[str, nn.Module]
    cells: Cells
    steps: int
    batch_size: int
    seed: int
    say: Callable[[str], None]

    def clean(self) -> Found:
        """Every role on the sentences as they are."""
        self.say("clean sentences")
        return self.cells.get(
            {"part": "clean"}, lambda: {r: self.right(r, self.texts.sentences) for r in self.models}
        )

    @torch.no_grad()
    def right(self, role: str, sentences: tuple[str, ...]) -> Bits:
        """[N], answered without gradients."""
        model: Any = self.models[role]
        answers = [model(**batch).logits.argmax(-1) for batch, _ in self._batches(sentences)]
        return (torch.cat(answers) == self.texts.labels).to(torch.int8).numpy()

    def attack(self, part: Part, level: str, maker: str) -> Found:
        """Who is right on what `part` makes, by who answers; noise is the same for every maker."""
        budget = part.budgets[level]
        facts = {"part": part.name, "budget": budget, "maker": maker, "steps": self.steps}
        self.say(f"{part.name} {level} on {maker}")
        craft = self._noise if part.norm == "rate" else self._embeddings
        return self.cells.get(facts, lambda: craft(part, budget, maker))

    def _noise(self, part: Part, budget: float, maker: str) -> Found:
        random = Random(integrity.digest(self.seed, part.name, budget))
        changed = tuple(part.module.disturb(t, budget, random) for t in self.texts.sentences)
        clean = self.clean()
        found = {r: self.right(r, changed) & clean[r] for r in HEARERS[maker] if r in self.models}
        return found | {UNROUNDED + role: bits for role, bits in found.items()}

    def _embeddings(self, part: Part, budget: float, maker: str) -> Found:
        generator, clean = drawn(self.seed, part.name, budget), self.clean()
        answered: dict[str, list[Tensor]] = {r: [] for r in HEARERS[maker] if r in self.models}
        for batch, labels in self._batches(self.texts.sentences):
            target = Sentences(self.models[maker], batch)
            x = embedded(self.models[maker], batch)
            found = part.module.perturb(target, x, labels, budget, generator, self.steps)
            for role, parts in answered.items():
                shift = embedded(self.models[role], batch) - x  # tables of two models may differ
                with torch.no_grad():
                    logits = Sentences(self.models[role], batch)(found + shift)
                parts.append(logits.argmax(-1) == labels)
        bits = {
            r: torch.cat(parts).to(torch.int8).numpy() & clean[r] for r, parts in answered.items()
        }
        return bits | {UNROUNDED + role: found for role, found in bits.items()}

    def _batches(self, sentences: tuple[str, ...]) -> list[tuple[dict[str, Tensor], Tensor]]:
        some: Any = next(iter(self.models.values()))
        starts = range(0, len(sentences), self.batch_size)
        return [
            (encode(some, self.texts.tokenizer, sentences[i : i + self.batch_size]),
             self.texts.labels[i : i + self.batch_size]) for i in starts
        ]  # fmt: skip
