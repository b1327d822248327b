"""The demo: a real BERT in eight and in four bits, checked, timed, saved, loaded, reported.

make demo        or        qtk demo
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import qtk
from qtk.demo import measure
from qtk.demo.sentences import split
from qtk.fidelity import Fidelity
from qtk.integrations.saving import save
from qtk.integrations.transformers import load_float
from qtk.modules.products.onednn import seven_bits_are_needed
from qtk.observe.batches import prepare
from qtk.report.summary import Summary
from qtk.timing import hardware, race


@dataclass(frozen=True)
class Sizes:
    """How much the demo looks at; the tests look at less.

    Attributes:
        calibration, evaluation: sentences.
        shapes: (batch, tokens) that are timed.
        rounds: times that each model is timed at each shape.
    """

    calibration: int = 256
    evaluation: int = 256
    shapes: tuple[tuple[int, int], ...] = ((16, 128), (1, 128))
    rounds: int = 15


@dataclass
class Variant:
    """One quantized model, measured."""

    name: str
    bits: tuple[int, int]
    model: nn.Module
    summary: Summary
    seconds: float  # to quantize
    fidelity: Fidelity
    spearman: float | None
    file_bytes: int
    reloads: bool
    times: dict[str, float] = field(default_factory=dict)  # shape -> seconds

    def to_dict(self) -> dict[str, Any]:
        return {
            "bits": self.bits,
            "seconds_to_quantize": self.seconds,
            "fidelity": self.fidelity.to_dict(),
            "spearman": self.spearman,
            "file_bytes": self.file_bytes,
            "reloads_bit_for_bit": self.reloads,
            "seconds": self.times,
            "summary": self.summary.to_dict(),
        }


@dataclass
class Results:
    """Everything that the demo measured; `show` makes the table and the page of it."""

    model: str
    hardware: dict[str, Any]
    sizes: Sizes
    spearman: float | None
    file_bytes: int
    times: dict[str, float]
    variants: list[Variant]
    ranges: measure.Ranges | None
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "hardware": self.hardware,
            "calibration_sentences": self.sizes.calibration,
            "evaluation_sentences": self.sizes.evaluation,
            "float": {
                "spearman": self.spearman, "file_bytes": self.file_bytes, "seconds": self.times
            },
            "variants": {variant.name: variant.to_dict() for variant in self.variants},
            "seconds": self.seconds,
        }  # fmt: skip


def run(
    out: str | Path = "demo-out",
    model_path: str | Path | None = None,
    schemes: tuple[tuple[int, int], ...] | None = None,
    sizes: Sizes | None = None,
    similarity: measure.Similarity | None = None,
    progress: bool = True,
) -> Results:
    """Quantizes a BERT encoder to each scheme, measures it, and writes OUT/report.html.

    Args:
        out: folder for the quantized models and the report.
        model_path: folder of the model and its tokenizer; None is all-MiniLM-L6-v2.
        schemes: (w, a) pairs; by default W8A8 and W4A4, and W7A8 between them on a CPU that
            computes that in integers and W8A8 in float32.
        sizes: how much to look at.
        similarity: labelled pairs; where None, no rank correlation is measured.
        progress: says on stderr what happens.

    Raises:
        QtkError: the model is not there, or cannot be quantized.
    """
    from qtk.demo.show import write_page

    began, out, sizes = time.perf_counter(), Path(out), sizes or Sizes()
    path = Path(model_path or measure.minilm())
    step = _steps(progress)
    with step("loading the model"):
        model, tokenizer = _open(path)
        calibration, evaluation = split(sizes.calibration, sizes.evaluation)
        batches = prepare(model, evaluation, tokenizer)

    def spearman(of: nn.Module) -> float | None:
        return None if similarity is None else similarity.spearman(of, tokenizer)

    variants, float_spearman = [], spearman(model)
    for w, a in usual_schemes() if schemes is None else schemes:
        name, start = f"W{w}A{a}", time.perf_counter()
        with step(f"quantizing to {name}"):
            qmodel: Any = qtk.quantize(
                model, w, a, calib=calibration, tokenizer=tokenizer, progress=progress
            )
        seconds = time.perf_counter() - start
        with step(f"comparing {name} with the float model"):
            fidelity, quality = qtk.evaluate(model, qmodel, batches), spearman(qmodel)
        with step(f"saving {name}, loading it in a fresh process"):
            folder = out / name.lower()
            save(qmodel, folder, [path])
            reloads = measure.reloads_exactly(qmodel, folder)
        variants.append(Variant(
            name, (w, a), qmodel, qtk.summary(qmodel), seconds, fidelity, quality,
            _weights_size(folder), reloads,
        ))  # fmt: skip
    results = Results(
        _name(path), hardware(), sizes, float_spearman, _weights_size(path), {}, variants, None
    )
    with step("timing"):
        _time(results, model)
    with step("drawing the report"):
        qmodels = {v.name: v.model for v in variants}
        results.ranges = measure.widest_site(model, qmodels, batches)
        results.seconds = time.perf_counter() - began
        write_page(results, out / "report.html")
    return results


def usual_schemes() -> tuple[tuple[int, int], ...]:
    """What there is to see on this machine: eight bits, the fastest of them, four bits."""
    seven = ((7, 8),) if seven_bits_are_needed() else ()
    return (8, 8), *seven, (4, 4)


def _open(path: Path) -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    return load_float(path).float().eval(), AutoTokenizer.from_pretrained(path)


def _time(results: Results, model: Any) -> None:
    """Fills in the seconds of every model at every shape."""
    models = {"float": model, **{v.name: v.model for v in results.variants}}
    for B, T in results.sizes.shapes:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, model.config.vocab_size, (B, T), generator=generator)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        rounds = results.sizes.rounds * (1 if B > 1 else 2)
        calls = {name: partial(other, **batch) for name, other in models.items()}
        seconds = race(calls, rounds)
        results.times[f"{B}x{T}"] = seconds["float"]
        for variant in results.variants:
            variant.times[f"{B}x{T}"] = seconds[variant.name]


def _steps(progress: bool) -> Callable[[str], Any]:
    """A context manager that says what is being done, and how long it took."""
    from rich.console import Console

    console = Console(stderr=True, quiet=not progress)

    @contextmanager
    def step(what: str) -> Iterator[None]:
        start = time.perf_counter()
        if sys.stderr.isatty():
            console.print(f"  [dim]{what} ...[/dim]", end="\r")
        yield
        took = time.perf_counter() - start
        console.print(f"[green]✓[/green] {what} [dim]({took:.1f} s)[/dim]" + " " * 8)

    return step


def _weights_size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _name(path: Path) -> str:
    return "all-MiniLM-L6-v2" if measure.PACKAGE in path.parts else path.name
