"""What quantization costs real models: MiniLM on STS-B, a small OPT on WikiText-2, a small ViT.

    python -m benchmarks.fidelity minilm | opt | vit | reviews | ablation | all [--only ROW ...]

writes benchmarks/results/fidelity_<name>.json, which the README's tables are made from. Every row
is the mean over calibration draws with seeds 0, 1 and 2, but for the ablation's and the
reviews', which are of seed 0. --only measures the named rows and keeps the others of the file.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

import qtk
from benchmarks import data
from qtk.round import gptq

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)
WINDOWS = 150  # of the 1,391 of WikiText-2 test
PLAIN: dict[str, Any] = {"method": "none", "rounding": "nearest", "ranges": "minmax"}
OS_PLUS: dict[str, Any] = {"method": "os+", "rounding": "nearest"}

MINILM: list[tuple[str, dict[str, Any]]] = [
    ("W8A8 min-max, nearest", {"w": 8, "a": 8, **PLAIN}),
    ("W8A8 fast", {"w": 8, "a": 8, "preset": "fast"}),
    ("W8A8", {"w": 8, "a": 8}),
    ("W8A8 best", {"w": 8, "a": 8, "preset": "best"}),
    ("W6A6", {"w": 6, "a": 6}),
    ("W4A8", {"w": 4, "a": 8}),
    ("W4A8 best", {"w": 4, "a": 8, "preset": "best"}),
    ("W4A4 min-max, nearest", {"w": 4, "a": 4, **PLAIN}),
    ("W4A4 OS+, nearest", {"w": 4, "a": 4, **OS_PLUS}),
    ("W4A4", {"w": 4, "a": 4}),
    ("W4A4 token", {"w": 4, "a": 4, "activations": "token"}),
    ("W4A4 best, 2,048 sentences", {"w": 4, "a": 4, "preset": "best", "sentences": 2048}),
    ("W4A16 g128", {"w": 4, "a": 16, "group_size": 128}),
    ("W4A16 g128 asymmetric", {"w": 4, "a": 16, "group_size": 128, "weights": "asymmetric"}),
    ("W4A16 g32 asymmetric", {"w": 4, "a": 16, "group_size": 32, "weights": "asymmetric"}),
    ("W3A16 g32 asymmetric", {"w": 3, "a": 16, "group_size": 32, "weights": "asymmetric"}),
]


def gptq_without(**settings: Any) -> dict[str, Any]:
    """GPTQ with so much ridge that nothing is fitted, or without rounds of descent after it."""
    return {"rounding": partial(gptq.find, **settings)}


ROTATE: dict[str, Any] = {"w": 4, "a": 4, "method": "rotate"}
EQUALIZE: dict[str, Any] = {"w": 4, "a": 4, "method": "equalize+rotate"}
ABLATION: list[tuple[str, dict[str, Any]]] = [
    ("min-max, nearest", {"w": 4, "a": 4, **PLAIN}),
    ("OS+, nearest", {"w": 4, "a": 4, **OS_PLUS}),
    ("rotate, min-max, nearest", {**ROTATE, "rounding": "nearest", "ranges": "minmax"}),
    ("rotate, weighted MSE, nearest", {**ROTATE, "rounding": "nearest"}),
    ("rotate, GPTQ", {**ROTATE, "rounding": "gptq"}),
    ("rotate, AdaRound", {**ROTATE, "rounding": "adaround"}),
    ("rotate, FlexRound", {**ROTATE, "rounding": "flexround"}),
    ("equalize, rotate, nearest", {**EQUALIZE, "rounding": "nearest"}),
    ("equalize, rotate, GPTQ alone", {**EQUALIZE, **gptq_without(fit_damp=1e12, rounds=0)}),
    ("equalize, rotate, GPTQ and descent", {**EQUALIZE, **gptq_without(fit_damp=1e12)}),
    ("equalize, rotate, GPTQ and fit", {**EQUALIZE, **gptq_without(rounds=0)}),
    ("equalize, rotate, GPTQ, fit and descent (balanced)", EQUALIZE),
    ("the same, bits='auto'", {**EQUALIZE, "bits": "auto"}),
    ("the same, 2,048 sentences", {**EQUALIZE, "sentences": 2048}),
    ("equalize, rotate, block", {**EQUALIZE, "rounding": "block"}),
    ("equalize, rotate, tuned (best)", {**EQUALIZE, "rounding": "tuned"}),
    (
        "equalize, rotate, tuned, 2,048 sentences",
        {**EQUALIZE, "rounding": "tuned", "sentences": 2048},
    ),
]
REVIEWS: list[tuple[str, dict[str, Any]]] = [
    ("W8A8", {"w": 8, "a": 8}),
    ("W4A8", {"w": 4, "a": 8}),
    ("W4A4 min-max, nearest", {"w": 4, "a": 4, **PLAIN}),
    ("W4A4 OS+, nearest", {"w": 4, "a": 4, **OS_PLUS}),
    ("W4A4", {"w": 4, "a": 4}),
    ("W6A6", {"w": 6, "a": 6}),
    ("W4A16 g128", {"w": 4, "a": 16, "group_size": 128}),
]
OPT: list[tuple[str, dict[str, Any]]] = [
    ("W8A8 min-max, nearest", {"w": 8, "a": 8, **PLAIN}),
    ("W8A8 OS+, nearest", {"w": 8, "a": 8, **OS_PLUS}),
    ("W8A8", {"w": 8, "a": 8}),
    ("W4A8", {"w": 4, "a": 8}),
    ("W4A4 token, OS+, nearest", {"w": 4, "a": 4, "activations": "token", **OS_PLUS}),
    ("W4A4", {"w": 4, "a": 4}),
    ("W4A4 token", {"w": 4, "a": 4, "activations": "token"}),
    ("W4A16 g128", {"w": 4, "a": 16, "group_size": 128}),
]
VIT: list[tuple[str, dict[str, Any]]] = [
    ("W8A8 min-max, nearest", {"w": 8, "a": 8, **PLAIN}),
    ("W8A8", {"w": 8, "a": 8}),
    ("W6A6", {"w": 6, "a": 6}),
    ("W4A8", {"w": 4, "a": 8}),
    ("W4A4 min-max, nearest", {"w": 4, "a": 4, **PLAIN}),
    ("W4A4", {"w": 4, "a": 4}),
]

Row = list[str]
Measure = Callable[[dict[str, Any], int], list[float]]  # options of quantize and a seed -> figures


@dataclass(frozen=True)
class Table:
    """A table to be measured: a row a case, a column a figure."""

    title: str
    columns: list[str]
    formats: list[str]
    cases: list[tuple[str, dict[str, Any]]]
    measure: Measure
    notes: str
    base: Row | None = None
    seeds: tuple[int, ...] = SEEDS


def minilm() -> Table:
    """Cosine of sentence embeddings to the float model's, and Spearman on STS-B test."""
    measure, base = similarity()
    return Table(
        "MiniLM sentence embeddings, STS-B test",
        ["scheme", "cosine", "worst", "STS-B Spearman"],
        ["{:.4f}", "{:.3f}", "{:.2f}"],
        MINILM,
        measure,
        "all-MiniLM-L6-v2, all six layers' linears; 256 unlabelled sentences of STS-B train unless "
        "a row says otherwise; cosine to the float32 embedding over all 2,552 distinct test "
        "sentences",
        base=["float32", "1", "1", f"{base:.2f}"],
    )


def ablation() -> Table:
    """What each part of the W4A4 recipe is worth."""
    measure, _ = similarity()

    def timed(options: dict[str, Any], seed: int) -> list[float]:
        start = time.perf_counter()
        figures = measure(options, seed)
        return [*figures, time.perf_counter() - start]

    return Table(
        "MiniLM at W4A4: what each part is worth",
        ["method, ranges and rounding", "cosine", "worst", "STS-B Spearman", "s"],
        ["{:.4f}", "{:.3f}", "{:.2f}", "{:.0f}"],
        ABLATION,
        timed,
        "as the table of MiniLM, one calibration draw; seconds with evaluation, one thread of a "
        "machine that had other work",
        seeds=(0,),
    )


def similarity() -> tuple[Measure, float]:
    """Of MiniLM: the measurement, and the float model's Spearman."""
    model, tokenizer = data.minilm()
    task = data.stsb_test(tokenizer)
    wanted = task.embeddings(model)

    def measure(options: dict[str, Any], seed: int) -> list[float]:
        options = dict(options)
        calib = data.stsb_calibration(seed, options.pop("sentences", 256))
        qmodel = quantize(model, calib, options, seed, tokenizer=tokenizer)
        got = task.embeddings(qmodel)
        cosines = (got * wanted).sum(-1)
        return [float(cosines.mean()), float(cosines.min()), task.spearman(got)]

    return measure, task.spearman(wanted)


def reviews() -> Table:
    """A second data set: film reviews, far from the calibration sentences."""
    model, tokenizer = data.minilm()
    task = data.reviews(tokenizer)
    wanted = task.embeddings(model)

    def measure(options: dict[str, Any], seed: int) -> list[float]:
        calib = data.stsb_calibration(seed)
        got = task.embeddings(quantize(model, calib, options, seed, tokenizer=tokenizer))
        cosines = (got * wanted).sum(-1)
        return [float(cosines.mean()), float(cosines.min()), task.probe(got)]

    return Table(
        "MiniLM sentence embeddings, film reviews",
        ["scheme", "cosine", "worst", "linear probe %"],
        ["{:.4f}", "{:.3f}", "{:.2f}"],
        REVIEWS,
        measure,
        "the first 1,000 positive and 1,000 negative sentences of the MR set, calibrated on 256 "
        "sentences of STS-B train; the probe is a ridge classifier on the embeddings of every "
        "other sentence, judged on the rest",
        base=["float32", "1", "1", f"{task.probe(wanted):.2f}"],
        seeds=(0,),
    )


def opt() -> Table:
    """Perplexity of the small OPT after large models' outlier channels were put in."""
    model, _ = data.opt()
    model = data.inject_outliers(model)
    base = data.perplexity(model, WINDOWS)

    def measure(options: dict[str, Any], seed: int) -> list[float]:
        qmodel = quantize(model, data.opt_calibration(seed), options, seed)
        perplexity = data.perplexity(qmodel, WINDOWS)
        return [perplexity, 100 * (perplexity / base - 1)]

    return Table(
        "Small OPT with injected outlier channels, WikiText-2 test",
        ["scheme", "perplexity", "over float"],
        ["{:.2f}", "{:+.2f} %"],
        OPT,
        measure,
        f"7 M parameters, the first {WINDOWS} windows of 256 tokens, calibrated on 64 windows of "
        "WikiText-2 valid; six channels of every LayerNorm made 40 times larger and one-sided "
        "without changing the function",
        base=["float32", f"{base:.2f}", ""],
    )


def vit() -> Table:
    """Top-1 of the small ViT."""
    model = data.vit()
    pixels, labels = data.cifar10("test", 10000)
    base = data.accuracy(model, pixels, labels)

    def measure(options: dict[str, Any], seed: int) -> list[float]:
        images, _ = data.cifar10("train", 128, seed)
        calib = [{"pixel_values": part} for part in images.split(32)]
        accuracy = data.accuracy(quantize(model, calib, options, seed), pixels, labels)
        return [accuracy, accuracy - base]

    return Table(
        "Small ViT, CIFAR-10 (JPEG) test, all 10,000 images",
        ["scheme", "top-1 %", "to float"],
        ["{:.2f}", "{:+.2f}"],
        VIT,
        measure,
        "2.7 M parameters, 32x32 pixels; calibrated on 128 training images",
        base=["float32", f"{base:.2f}", ""],
    )


def quantize(model: Any, calib: Any, options: dict[str, Any], seed: int, **more: Any) -> Any:
    return qtk.quantize(model, calib=calib, seed=seed, progress=False, **options, **more)


def rows_of(table: Table, path: Path, only: list[str]) -> Iterator[list[Row]]:
    """The table's rows, again after each that was measured, so that stopping loses nothing."""
    kept = {}
    if only:
        kept = {row[0]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}
    if table.base:
        kept[table.base[0]] = table.base
    order = [table.base[0], *(name for name, _ in table.cases)] if table.base else []
    order = order or [name for name, _ in table.cases]
    for name, options in table.cases:
        if only and name not in only:
            continue
        figures = [table.measure(options, seed) for seed in table.seeds]
        means = [mean(column) for column in zip(*figures, strict=True)]
        kept[name] = [name, *(f.format(x) for f, x in zip(table.formats, means, strict=True))]
        print("  ".join(kept[name]), file=sys.stderr, flush=True)
        yield [kept[name] for name in order if name in kept]


def document(table: Table, rows: list[Row]) -> dict[str, Any]:
    """What is written down of a table."""
    seeds = ", ".join(map(str, table.seeds))
    drawn = f"Means over calibration seeds {seeds}" if len(table.seeds) > 1 else f"Seed {seeds}"
    return result(table.title, table.columns, rows, f"{table.notes}. {drawn}.")


def result(title: str, columns: list[str], rows: list[Row], notes: str) -> dict[str, Any]:
    return {
        "title": title,
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {
            "qtk": qtk.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "columns": columns,
        "rows": rows,
        "notes": notes,
    }


TABLES = {"minilm": minilm, "opt": opt, "vit": vit, "reviews": reviews, "ablation": ablation}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("name", choices=[*TABLES, "all"])
    parser.add_argument("--only", nargs="+", default=[], help="names of rows")
    options = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    for key in TABLES if options.name == "all" else (options.name,):
        table, path = TABLES[key](), RESULTS / f"fidelity_{key}.json"
        for rows in rows_of(table, path, options.only):
            text = json.dumps(document(table, rows), indent=1, ensure_ascii=False)
            path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
