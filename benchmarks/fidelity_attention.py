"""What quantized attention costs real models: a small ViT, MiniLM and a small OPT.

    python -m benchmarks.fidelity_attention vit | ranges | gelu | softmax | minilm | opt | all

writes benchmarks/results/fidelity_attention_<name>.json after every figure; with --resume, the
figures that the file holds are not measured again.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from benchmarks import data
from benchmarks.fidelity import RESULTS, SEEDS, Row, quantize, result
from qtk.numerics import fake_quantize, scale_and_zero_point
from qtk.ranges import hessian
from qtk.scheme import Format

IMAGES = 1000  # of the 10,000 of CIFAR-10 test
IMAGES_RANGES = 500
CALIBRATION = 64  # images
WINDOWS = 20  # of the 1,391 of WikiText-2 test
PATCHES = {"*patch_embeddings.projection": (8, 8)}
PLAIN: dict[str, Any] = {"method": "none", "rounding": "nearest"}


def whole(bits: int, softmax: str = "matthew") -> dict[str, Any]:
    """Linears, both attention products, softmax and patch embedding."""
    return {"w": bits, "a": bits, "attention": f"int{bits}", "softmax": softmax, "bits": PATCHES}


EVERYTHING: list[tuple[str, dict[str, Any]]] = [
    ("W8A8, int8 products, matthew 8", whole(8)),
    ("W6A6, int6 products, matthew 6", whole(6)),
    ("W4A4, int4 products, matthew 4", whole(4)),
    ("W4A4, int4 products, code 4 steps", whole(4, "code")),
]
RANGES: list[tuple[str, Any]] = [
    ("minmax", "minmax"),
    ("mse", "mse"),
    ("hessian, block, bottom 0.1", "hessian"),
    ("hessian, block, bottom 0", partial(hessian.find, bottom_ratio=0.0)),
    ("hessian, block, bottom 0.3", partial(hessian.find, bottom_ratio=0.3)),
    ("hessian, layer, bottom 0.1", partial(hessian.find, granularity="layer")),
]
SOFTMAX: list[tuple[str, dict[str, Any]]] = [
    (name, {"w": 16, "a": 16, "softmax": kind, "softmax_bits": bits})
    for name, kind, bits in (
        ("uniform 8-bit", "uniform", 8),
        ("uniform 4-bit", "uniform", 4),
        ("matthew 4-bit", "matthew", 4),
        ("log2 4-bit", "log2", 4),
        ("log-sqrt2 4-bit", "log-sqrt2", 4),
        ("code, 1 step an octave", "code", 5),
        ("code, 2 steps", "code", 6),
        ("code, 4 steps", "code", 7),
    )
]
EVERYTHING_OPT: list[tuple[str, dict[str, Any]]] = [
    ("W8A8, int8 products, code 4 steps", {"w": 8, "a": 8, "attention": "int8", "softmax": "code"}),
    ("W8A8, int8 products, matthew 8", {"w": 8, "a": 8, "attention": "int8", "softmax": "matthew"}),
]


Cases = list[tuple[str, dict[str, Any]]]
Measure = Callable[[dict[str, Any], int], list[float]]


@dataclass
class Table:
    """One result file, written again after every figure, so that an interruption loses nothing.

    A row is the mean over the draws that are done; its last column says how many that is.
    """

    name: str
    title: str
    columns: list[str]
    formats: list[str]
    notes: str
    base: Row
    resume: bool = False

    @property
    def path(self) -> Path:
        return RESULTS / f"fidelity_attention_{self.name}.json"

    def fill(self, cases: Cases, measure: Measure) -> None:
        """Every case with seed 0, then every case that calibrates with seed 1, then 2."""
        figures: dict[str, dict[str, list[float]]] = {name: {} for name, _ in cases}
        if self.resume and self.path.exists():
            figures |= json.loads(self.path.read_text(encoding="utf-8")).get("figures", {})
        for seed in SEEDS:
            for name, options in cases:
                if seed in seeds_of(options) and str(seed) not in figures[name]:
                    figures[name][str(seed)] = measure(options, seed)
                    self.write(figures)
                    print(seed, *self.row(name, figures[name]), file=sys.stderr, flush=True)

    def row(self, name: str, draws: dict[str, list[float]]) -> Row:
        means = [mean(column) for column in zip(*draws.values(), strict=True)]
        cells = (f.format(x) for f, x in zip(self.formats, means, strict=True))
        return [name, *cells, str(len(draws))]

    def write(self, figures: dict[str, dict[str, list[float]]]) -> None:
        rows = [self.row(name, draws) for name, draws in figures.items() if draws]
        table = result(self.title, [*self.columns, "draws"], [[*self.base, ""], *rows], "")
        table["notes"] = (
            f"{self.notes}. A row is the mean over its calibration draws, seeds 0 and up; what "
            "needs no calibration data has one."
        )
        text = json.dumps({**table, "figures": figures}, indent=1, ensure_ascii=False)
        self.path.write_text(text + "\n", encoding="utf-8")


def seeds_of(options: dict[str, Any]) -> tuple[int, ...]:
    """All seeds where calibration is drawn, else one."""
    drawn = options["w"] < 16 or options.get("softmax") == "matthew"
    return SEEDS if drawn else SEEDS[:1]


def calibration(seed: int) -> list[dict[str, Tensor]]:
    images, _ = data.cifar10("train", CALIBRATION, seed)
    return [{"pixel_values": part} for part in images.split(32)]


@torch.no_grad()
def logits(model: Any, pixels: Tensor) -> Tensor:
    return torch.cat([model(pixel_values=x).logits.float() for x in pixels.split(100)])


def top1(logits: Tensor, labels: Tensor) -> float:
    return 100 * float((logits.argmax(-1) == labels).float().mean())


def divergence(wanted: Tensor, got: Tensor) -> float:
    """Mean KL divergence, in nats: what accuracy on few images cannot tell apart."""
    p, q = wanted.log_softmax(-1), got.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def vit_table(name: str, images: int, title: str, notes: str, cases: Cases, resume: bool) -> None:
    """Top-1 of the small ViT and the time that quantizing took."""
    model = data.vit()
    pixels, labels = data.cifar10("test", images)
    wanted = logits(model, pixels)
    base = top1(wanted, labels)

    def measure(options: dict[str, Any], seed: int) -> list[float]:
        start = time.perf_counter()
        qmodel = quantize(model, calibration(seed), options, seed)
        seconds = time.perf_counter() - start
        got = logits(qmodel, pixels)
        accuracy = top1(got, labels)
        return [accuracy, accuracy - base, divergence(wanted, got), seconds]

    Table(
        name,
        f"Small ViT, CIFAR-10 (JPEG) test, {images:,} images: {title}",
        ["scheme", "top-1 %", "to float", "KL to float", "seconds to quantize"],
        ["{:.2f}", "{:+.2f}", "{:.5f}", "{:.0f}"],
        f"2.7 M parameters, 32x32 pixels; calibrated on {CALIBRATION} training images; seconds are "
        f"of one thread on a shared machine. {notes}",
        ["float32", f"{base:.2f}", "", "0", ""],
        resume,
    ).fill(cases, measure)


def vit(resume: bool) -> None:
    vit_table(
        "vit", IMAGES, "everything quantized",
        "All linears, both products of attention, softmax, and the patch embedding at 8 bits",
        EVERYTHING, resume,
    )  # fmt: skip


def ranges(resume: bool) -> None:
    cases = [(name, {**whole(4), **PLAIN, "ranges": rule}) for name, rule in RANGES]
    vit_table(
        "ranges", IMAGES_RANGES, "ranges of static activations at W4A4",
        "Everything quantized, matthew softmax, no transform, nearest rounding: only ranges differ",
        cases, resume,
    )  # fmt: skip


def softmax(resume: bool) -> None:
    vit_table(
        "softmax", IMAGES, "softmax alone", "Everything else in floating point", SOFTMAX, resume
    )  # fmt: skip


def gelu(resume: bool) -> None:
    """The input of the second MLP linear alone at 4 bits: the ways to deal with GELU."""
    model = data.vit()
    pixels, labels = data.cifar10("test", IMAGES)
    base = top1(logits(model, pixels), labels)

    def measure(options: dict[str, Any], seed: int) -> list[float]:
        handles, sqnr = [], []
        for linear, x in fc2_inputs(model, calibration(seed)).items():
            grid = options["grid"](x)
            weight = linear.weight.detach()
            error = (grid(x) - x) @ weight.T
            sqnr.append(10 * float(((x @ weight.T).square().sum() / error.square().sum()).log10()))
            handles.append(linear.register_forward_pre_hook(_through(grid)))
        accuracy = top1(logits(model, pixels), labels)
        for handle in handles:
            handle.remove()
        return [accuracy, accuracy - base, mean(sqnr)]

    cases = [
        ("asymmetric, one range", plain_range),
        ("twin ranges (PTQ4ViT)", twin_ranges),
        ("shift and scale (OS+)", shifted_range),
    ]
    Table(
        "gelu",
        f"Small ViT, CIFAR-10 (JPEG) test, {IMAGES:,} images: GELU outputs alone at 4 bits",
        ["grid", "top-1 %", "to float", "SQNR of fc2, dB"],
        ["{:.2f}", "{:+.2f}", "{:.1f}"],
        "Static grids a layer, the rest in floating point; ends with the smallest squared error of "
        "the grid itself",
        ["float32", f"{base:.2f}", "", ""],
        resume,
    ).fill([(name, {"w": 8, "grid": grid}) for name, grid in cases], measure)


def _through(grid: "Function") -> Callable[[Any, tuple[Tensor, ...]], tuple[Tensor]]:
    return lambda _, args: (grid(args[0]),)


@torch.no_grad()
def fc2_inputs(model: Any, batches: list[dict[str, Tensor]]) -> dict[Any, Tensor]:
    """[T, K] that the second MLP linear of every block reads."""
    seen: dict[Any, list[Tensor]] = {layer.mlp.fc2: [] for layer in model.vit.layers}
    handles = [
        linear.register_forward_pre_hook(lambda m, args: seen[m].append(args[0].flatten(0, -2)))
        for linear in seen
    ]
    for batch in batches:
        model(**batch)
    for handle in handles:
        handle.remove()
    return {linear: torch.cat(parts) for linear, parts in seen.items()}


ENDS = [0.9**k for k in range(30)]
Function = Callable[[Tensor], Tensor]


def best(candidates: list[Function], x: Tensor) -> Function:
    return min(candidates, key=lambda f: float((f(x) - x).square().sum()))


def grid_over(lo: Tensor, hi: Tensor) -> Function:
    fmt = Format(4, symmetric=False)
    scale, zero_point = scale_and_zero_point(lo, hi, fmt)
    return lambda x: fake_quantize(x, scale, zero_point, fmt)


def plain_range(x: Tensor) -> Function:
    return best([grid_over(x.min(), x.max() * c) for c in ENDS], x)


def twin_ranges(x: Tensor) -> Function:
    """PTQ4ViT: a bit says which half, three bits the code; the negative half ends at min GELU."""
    negative = 0.16997 / 7

    def function(end: Tensor) -> Function:
        positive = end / 7
        return lambda x: torch.where(
            x < 0, (x / negative).round().clamp(-7, 0) * negative,
            (x / positive).round().clamp(0, 7) * positive,
        )  # fmt: skip

    return best([function(x.max() * c) for c in ENDS], x)


def shifted_range(x: Tensor) -> Function:
    """OS+: every channel centred, large ones scaled down to a threshold; then one range."""
    lo, hi = x.amin(0), x.amax(0)
    shift, reach = (lo + hi) / 2, (hi - lo) / 2

    def function(share: float) -> Function:
        scale = (reach / (reach.max() * share)).clamp(min=1.0)
        y = (x - shift) / scale
        grid = grid_over(y.min(), y.max())
        return lambda x: grid((x - shift) / scale) * scale + shift

    return best([function(c) for c in ENDS], x)


def minilm(resume: bool) -> None:
    """Cosine of sentence embeddings to the float model's."""
    from transformers import AutoModel, AutoTokenizer

    path = data.minilm_path()
    model, tokenizer = AutoModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    task = data.stsb_test(tokenizer)
    wanted = task.embeddings(model)

    def measure(options: dict[str, Any], seed: int) -> list[float]:
        sentences = data.stsb_calibration(seed)
        got = task.embeddings(quantize(model, sentences, options, seed, tokenizer=tokenizer))
        cosines = (got * wanted).sum(-1)
        return [float(cosines.mean()), float(cosines.min()), task.spearman(got)]

    Table(
        "minilm",
        "MiniLM sentence embeddings, STS-B test: softmax alone",
        ["softmax", "cosine", "worst", "STS-B Spearman"],
        ["{:.5f}", "{:.4f}", "{:.2f}"],
        "all-MiniLM-L6-v2, everything else in floating point; cosine to the float32 embedding over "
        "all 2,552 distinct test sentences",
        ["float32", "1", "1", f"{task.spearman(wanted):.2f}"],
        resume,
    ).fill(SOFTMAX, measure)


def opt(resume: bool) -> None:
    """Perplexity of the small OPT, causal masks."""
    model, _ = data.opt()
    base = data.perplexity(model, WINDOWS)

    def measure(options: dict[str, Any], seed: int) -> list[float]:
        qmodel = quantize(model, data.opt_calibration(seed, 16), options, seed)
        perplexity = data.perplexity(qmodel, WINDOWS)
        return [perplexity, 100 * (perplexity / base - 1)]

    Table(
        "opt",
        "Small OPT, WikiText-2 test: softmax alone, and everything",
        ["softmax", "perplexity", "over float"],
        ["{:.2f}", "{:+.2f} %"],
        f"7 M parameters, the first {WINDOWS} windows of 256 tokens, causal masks; calibrated on "
        "16 windows of WikiText-2 valid",
        ["float32", f"{base:.2f}", ""],
        resume,
    ).fill([*SOFTMAX, *EVERYTHING_OPT], measure)


TABLES = {
    "vit": vit, "ranges": ranges, "gelu": gelu, "softmax": softmax, "minilm": minilm, "opt": opt,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("name", choices=[*TABLES, "all"])
    parser.add_argument("--resume", action="store_true", help="keep the figures in the file")
    args = parser.parse_args()
    for key in TABLES if args.name == "all" else (args.name,):
        TABLES[key](args.resume)


if __name__ == "__main__":
    main()
