"""audit(): whether quantizing a model would wake a backdoor."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from qtk.discover import available, load
from qtk.errors import SchemeError
from qtk.integrations.transformers import load_float
from qtk.models import is_network
from qtk.observe.batches import prepare
from qtk.report import page
from qtk.report.plots import columns
from qtk.security.evidence import Evidence, Suspect
from qtk.table import finite, markdown, ruled

HEAD = ["evidence", "number", "threshold", "speaks"]
ENOUGH = 2  # evidences that must speak
BLIND = (
    "Not seen: backdoors for grids other than min-max ones of the same width, for rounded "
    "activations alone, those that are awake in floating point, and triggers that no random patch "
    "or token resembles, if in addition the weights lie innocently."
)


@dataclass(frozen=True)
class Audit:
    """What was found.

    Attributes:
        evidences: by the order of their names.
        w: bits of the weights that were looked at.
        samples: inputs, those with random patches or tokens included.
        seed: of what was drawn.
    """

    evidences: tuple[Evidence, ...]
    w: int
    samples: int
    seed: int
    title: ClassVar[str] = "Audit"

    @property
    def suspicious(self) -> bool:
        """Whether at least two evidences speak for a backdoor, or one that is enough alone."""
        speak = [evidence for evidence in self.evidences if evidence.speaks]
        return len(speak) >= ENOUGH or any(evidence.alone for evidence in speak)

    @property
    def verdict(self) -> str:
        """In a sentence."""
        speak = [evidence.name for evidence in self.evidences if evidence.speaks]
        if self.suspicious:
            return (
                f"suspicious at {self.w} bits: {' and '.join(speak)} "
                f"{'speaks' if len(speak) == 1 else 'speak'} for a backdoor that rounding to "
                "nearest wakes; rounding='flipped' breaks such"
            )
        told = f", though {speak[0]} speaks for it" if speak else ""
        return f"no backdoor found at {self.w} bits{told}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        found: dict[str, Any] = finite({
            "suspicious": self.suspicious, "verdict": self.verdict, "w": self.w,
            "samples": self.samples, "seed": self.seed, "blind": BLIND,
            "evidences": [{**asdict(e), "speaks": e.speaks} for e in self.evidences],
        })  # fmt: skip
        return found

    def table(self) -> str:
        """Plain text: a line an evidence, what each means, and the verdict."""
        lines = ruled(HEAD, self._cells())
        told = [f"{e.name}: {e.sentence}" for e in self.evidences]
        return "\n".join([*lines, "", *told, "", self.verdict, BLIND])

    def markdown(self) -> str:
        """The same in Markdown."""
        told = [f"{e.name}: {e.sentence}\n" for e in self.evidences]
        return "\n".join([*markdown(HEAD, self._cells()), "", *told, f"{self.verdict}\n", BLIND])

    def html(self) -> str:
        """The same for a page (`qtk.trust_page`), with the figures behind each evidence."""
        drawn = [page.figure(columns(e.shown), f"{e.name}: {e.sentence}.") for e in self.evidences]
        told = (
            f"{self.samples} inputs, random patches or tokens included; seed {self.seed}. {BLIND}"
        )
        verdict = page.paragraph(f"{self.verdict}.")
        return "\n".join([verdict, page.table(HEAD, self._cells()), *drawn, page.paragraph(told)])

    def _cells(self) -> list[list[str]]:
        return [
            [e.name, f"{e.number:.2f}", f"{e.threshold:.2f}", "yes" if e.speaks else "no"]
            for e in self.evidences
        ]


def audit(
    model: nn.Module | str | Path, calib: Any, tokenizer: Any = None, *, w: int = 8, seed: int = 0
) -> Audit:  # fmt: skip
    """Looks for a backdoor that sleeps in floating point and that rounding to nearest would wake.

    Args:
        model: a classifier in floating point, or the path or hub name of one.
        calib: inputs without labels, as `qtk.quantize` takes them; some hundreds.
        tokenizer: tokenizer or image processor for `calib`.
        w: bits of the weights that it would be quantized to, 2 to 8.
        seed: of random patches, tokens and roundings.

    Raises:
        SchemeError: no such width.
        ModelError: the model is no classifier.
        CalibrationError: not what the model reads.
    """
    if isinstance(w, bool) or w not in range(2, 9):
        raise SchemeError(f"w={w!r}: choose 2 to 8")
    source = load_float(model)
    batches: Sequence[Any] = prepare(source, calib, tokenizer, seed)
    if is_network(source):  # which may have inputs of any name
        batches = [batch if len(batch) > 1 else next(iter(batch.values())) for batch in batches]
    was = source.training
    suspect = Suspect(source.eval(), batches, w, seed)
    try:
        names = available("security.evidence")
        found = tuple(load("security.evidence", name).weigh(suspect) for name in names)
        return Audit(found, w, len(suspect.floats), seed)
    finally:
        source.train(was)
