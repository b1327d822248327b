"""What quantization costs real models: MiniLM on STS-B, a small OPT on WikiText-2, a small ViT.

    python -m benchmarks.fidelity minilm | opt | vit | all

writes benchmarks/results/fidelity_<name>.json, which the README's tables are made from. Every row
is the mean over calibration draws with seeds 0, 1 and 2, in one process.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

import qtk
from benchmarks import data

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
    ("W4A16 g128", {"w": 4, "a": 16, "group_size": 128}),
]
OPT: list[tuple[str, dict[str, Any]]] = [
    ("W8A8 min-max, nearest", {"w": 8, "a": 8, **PLAIN}),
    ("W8A8 OS+, nearest", {"w": 8, "a": 8, **OS_PLUS}),
    ("W8A8", {"w": 8, "a": 8}),
    ("W4A8", {"w": 4, "a": 8}),
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


def minilm() -> dict[str, Any]:
    """Cosine of sentence embeddings to the float model's, and Spearman on STS-B test."""
    from transformers import AutoModel, AutoTokenizer

    path = data.minilm_path()
    model, tokenizer = AutoModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    task = data.stsb_test(tokenizer)
    wanted = task.embeddings(model)

    def measure(options: dict[str, Any], seed: int) -> list[float]:
        qmodel = quantize(model, data.stsb_calibration(seed), options, seed, tokenizer=tokenizer)
        got = task.embeddings(qmodel)
        cosines = (got * wanted).sum(-1)
        return [float(cosines.mean()), float(cosines.min()), task.spearman(got)]

    rows = [["float32", "1", "1", f"{task.spearman(wanted):.2f}"]]
    rows += table(MINILM, measure, ["{:.4f}", "{:.3f}", "{:.2f}"])
    columns = ["scheme", "cosine", "worst", "STS-B Spearman"]
    return result(
        "MiniLM sentence embeddings, STS-B test", columns, rows,
        "all-MiniLM-L6-v2, all six layers' linears; 256 unlabelled sentences of STS-B train; "
        "cosine to the float32 embedding over all 2,552 distinct test sentences",
    )  # fmt: skip


def opt() -> dict[str, Any]:
    """Perplexity of the small OPT after large models' outlier channels were put in."""
    model, _ = data.opt()
    model = data.inject_outliers(model)
    base = data.perplexity(model, WINDOWS)

    def measure(options: dict[str, Any], seed: int) -> list[float]:
        qmodel = quantize(model, data.opt_calibration(seed), options, seed)
        perplexity = data.perplexity(qmodel, WINDOWS)
        return [perplexity, 100 * (perplexity / base - 1)]

    rows = [["float32", f"{base:.2f}", ""], *table(OPT, measure, ["{:.2f}", "{:+.2f} %"])]
    return result(
        "Small OPT with injected outlier channels, WikiText-2 test",
        ["scheme", "perplexity", "over float"],
        rows,
        f"7 M parameters, the first {WINDOWS} windows of 256 tokens, calibrated on 64 windows of "
        "WikiText-2 valid; six channels of every LayerNorm made 40 times larger and one-sided "
        "without changing the function",
    )


def vit() -> dict[str, Any]:
    """Top-1 of the small ViT."""
    model = data.vit()
    pixels, labels = data.cifar10("test", 10000)
    base = data.accuracy(model, pixels, labels)

    def measure(options: dict[str, Any], seed: int) -> list[float]:
        images, _ = data.cifar10("train", 128, seed)
        calib = [{"pixel_values": part} for part in images.split(32)]
        accuracy = data.accuracy(quantize(model, calib, options, seed), pixels, labels)
        return [accuracy, accuracy - base]

    rows = [["float32", f"{base:.2f}", ""], *table(VIT, measure, ["{:.2f}", "{:+.2f}"])]
    return result(
        "Small ViT, CIFAR-10 (JPEG) test, all 10,000 images",
        ["scheme", "top-1 %", "to float"],
        rows,
        "2.7 M parameters, 32x32 pixels; calibrated on 128 training images",
    )


def quantize(model: Any, calib: Any, options: dict[str, Any], seed: int, **more: Any) -> Any:
    return qtk.quantize(model, calib=calib, seed=seed, progress=False, **options, **more)


def table(
    cases: list[tuple[str, dict[str, Any]]],
    measure: Callable[[dict[str, Any], int], list[float]],
    formats: list[str],
) -> list[Row]:
    """One row a case: the mean over SEEDS of every figure."""
    rows = []
    for name, options in cases:
        figures = [measure(options, seed) for seed in SEEDS]
        means = [mean(column) for column in zip(*figures, strict=True)]
        rows.append([name, *(f.format(x) for f, x in zip(formats, means, strict=True))])
        print("  ".join(rows[-1]), file=sys.stderr, flush=True)
    return rows


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
        "notes": f"{notes}. Means over calibration seeds {', '.join(map(str, SEEDS))}.",
    }  # fmt: skip


TABLES = {"minilm": minilm, "opt": opt, "vit": vit}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("name", choices=[*TABLES, "all"])
    name = parser.parse_args().name
    for key in TABLES if name == "all" else (name,):
        text = json.dumps(TABLES[key](), indent=1, ensure_ascii=False)
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"fidelity_{key}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
