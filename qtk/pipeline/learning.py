"""Whether anything is learned after rounding, and what came of it: a choice of the whole model."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from qtk.learn.block import learn_block
from qtk.learn.descent import Learned, Report
from qtk.learn.model import learn_model
from qtk.observe import Batch, Call
from qtk.pipeline.assign import Assignment
from qtk.pipeline.request import Request
from qtk.record import Layer

logger = logging.getLogger("qtk")


@dataclass
class Learning:
    """What learns, and the losses on held-out batches so far."""

    request: Request
    report: Report
    results: list[Learned] = field(default_factory=list)

    def after_block(self, module: nn.Module, calls: Sequence[Call]) -> Learned | None:
        """Learns a block whose linears are all quantized."""
        if self.request.learn != "block":
            return None
        self.results.append(learn_block(module, calls, self.request.seed, self.report))
        return self.results[-1]

    def after_all(
        self, model: nn.Module, teacher: nn.Module, batches: Sequence[Batch] | None,
        made: dict[str, Layer], path: Path | None = None,
    ) -> dict[str, Layer]:  # fmt: skip
        """Learns the whole model; returns what the record says of the layers then.

        Args:
            path: a file to keep the state of learning in.
        """
        if self.request.learn == "model" and batches is not None:
            seed = self.request.seed
            self.results.append(learn_model(model, teacher, batches, seed, self.report, path))
        if not self.changed:
            return made
        # what each layer gave before it was learned is of no use
        return {name: replace(layer, sqnr=None) for name, layer in made.items()}

    @property
    def changed(self) -> bool:
        """Whether anything but the start was kept."""
        return any(result.after < result.before for result in self.results)

    def told(self) -> dict[str, Any] | None:
        """For the record; says in the log where all was for nothing."""
        if self.request.learn is None:
            return None
        if not self.changed:
            logger.warning("nothing learned: held-out data did not confirm; rounding's codes stay")
        losses = [[_rounded(r.before), _rounded(r.after)] for r in self.results]
        return {"of": self.request.learn, "changed": self.changed, "held_out_loss": losses}


def _rounded(loss: float) -> float | None:
    return float(f"{loss:.6g}") if math.isfinite(loss) else None


def say_who_disagrees(request: Request, found: Assignment) -> None:
    """Says in the log which layers' own recipes would learn otherwise than the whole model does."""
    others = {n: c for n, c in found.quantized.items() if c.recipe.learn != request.learn}
    if others:
        name, choice = next(iter(others.items()))
        wanted, done = (what or "none" for what in (choice.recipe.learn, request.learn))
        logger.warning(
            "learning is one choice of the whole model, the default layer's: learn=%r. The recipes "
            "of %d layers, such as %s, say %r; give learn= to decide.",
            done, len(others), name, wanted,
        )  # fmt: skip
