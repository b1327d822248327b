"""What quantized attention costs real models: a small ViT, MiniLM and a small OPT.

    python -m benchmarks.accuracy.attention vit | ranges | softmax | minilm | opt | all [--resume]

writes benchmarks/results/fidelity_attention_<name>.json after every figure; with --resume, the
figures that the file holds are not measured again.
"""

import argparse
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks import data
from benchmarks.accuracy.table import Cases, Options, Table, quantize, seeds_where_calibrated
from qtk.ranges import hessian

IMAGES = 1000  # of the 10,000 of CIFAR-10 test
IMAGES_RANGES = 500
CALIBRATION = 64  # images
WINDOWS = 20  # of the 1,391 of WikiText-2 test
PATCHES = {"*patch_embeddings.projection": (8, 8)}
PLAIN: Options = {"method": "none", "rounding": "nearest"}


def whole(bits: int, softmax: str = "matthew") -> Options:
    """Linears, both attention products, softmax and patch embedding."""
    return {"w": bits, "a": bits, "attention": f"int{bits}", "softmax": softmax, "bits": PATCHES}


EVERYTHING: Cases = [
    ("W8A8, int8 products, matthew 8", whole(8)),
    ("W6A6, int6 products, matthew 6", whole(6)),
    ("W4A4, int4 products, matthew 4", whole(4)),
    ("W4A4, int4 products, code 4 steps", whole(4, "code")),
]
RANGES: list[tuple[str, str, hessian.Settings]] = [
    ("minmax", "minmax", hessian.Settings()),
    ("mse", "mse", hessian.Settings()),
    ("hessian, block, bottom 0.1", "hessian", hessian.Settings()),
    ("hessian, block, bottom 0", "hessian", hessian.Settings(0.0)),
    ("hessian, block, bottom 0.3", "hessian", hessian.Settings(0.3)),
    ("hessian, layer, bottom 0.1", "hessian", hessian.Settings(granularity="layer")),
]
SOFTMAX: Cases = [
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
EVERYTHING_OPT: Cases = [
    ("W8A8, int8 products, code 4 steps", {"w": 8, "a": 8, "attention": "int8", "softmax": "code"}),
    ("W8A8, int8 products, matthew 8", {"w": 8, "a": 8, "attention": "int8", "softmax": "matthew"}),
]


def apply(model: Any, calib: Any, options: Options, seed: int, **more: Any) -> Any:
    """The quantized model of a case; its "settings" are those of the range search."""
    settings = options.get("settings", hessian.Settings())
    theirs = {key: value for key, value in options.items() if key != "settings"}
    with hessian.using(settings):
        return quantize(model, calib, theirs, seed, **more)


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


def vit_table(name: str, images: int, title: str, notes: str, cases: Cases) -> Table:
    """Top-1 of the small ViT and the time that quantizing took."""
    model = data.vit()
    pixels, labels = data.cifar10("test", images)
    wanted = logits(model, pixels)
    base = top1(wanted, labels)

    def measure(options: Options, seed: int) -> list[float]:
        start = time.perf_counter()
        qmodel = apply(model, calibration(seed), options, seed)
        seconds = time.perf_counter() - start
        got = logits(qmodel, pixels)
        accuracy = top1(got, labels)
        return [accuracy, accuracy - base, divergence(wanted, got), seconds]

    return Table(
        f"fidelity_attention_{name}",
        f"Small ViT, CIFAR-10 (JPEG) test, {images:,} images: {title}",
        ["scheme", "top-1 %", "to float", "KL to float", "seconds to quantize"],
        ["{:.2f}", "{:+.2f}", "{:.5f}", "{:.0f}"],
        cases,
        measure,
        f"2.7 M parameters, 32x32 pixels; calibrated on {CALIBRATION} training images; seconds are "
        f"of one thread on a shared machine. {notes}",
        ["float32", f"{base:.2f}", "", "0", ""],
        seeds_where_calibrated,
    )


def vit() -> Table:
    return vit_table(
        "vit", IMAGES, "everything quantized",
        "All linears, both products of attention, softmax, and the patch embedding at 8 bits",
        EVERYTHING,
    )  # fmt: skip


def ranges() -> Table:
    cases = [
        (name, {**whole(4), **PLAIN, "ranges": rule, "settings": settings})
        for name, rule, settings in RANGES
    ]
    return vit_table(
        "ranges", IMAGES_RANGES, "ranges of static activations at W4A4",
        "Everything quantized, matthew softmax, no transform, nearest rounding: only ranges differ",
        cases,
    )  # fmt: skip


def softmax() -> Table:
    return vit_table(
        "softmax", IMAGES, "softmax alone", "Everything else in floating point", SOFTMAX
    )


def minilm() -> Table:
    """Cosine of sentence embeddings to the float model's."""
    model, tokenizer = data.minilm()
    task = data.stsb_test(tokenizer)
    wanted = task.embeddings(model)

    def measure(options: Options, seed: int) -> list[float]:
        sentences = data.stsb_calibration(seed)
        got = task.embeddings(apply(model, sentences, options, seed, tokenizer=tokenizer))
        cosines = (got * wanted).sum(-1)
        return [float(cosines.mean()), float(cosines.min()), task.spearman(got)]

    return Table(
        "fidelity_attention_minilm",
        "MiniLM sentence embeddings, STS-B test: softmax alone",
        ["softmax", "cosine", "worst", "STS-B Spearman"],
        ["{:.5f}", "{:.4f}", "{:.2f}"],
        SOFTMAX,
        measure,
        "all-MiniLM-L6-v2, everything else in floating point; cosine to the float32 embedding over "
        "all 2,552 distinct test sentences",
        ["float32", "1", "1", f"{task.spearman(wanted):.2f}"],
        seeds_where_calibrated,
    )


def opt() -> Table:
    """Perplexity of the small OPT, causal masks."""
    model, _ = data.opt()
    base = data.perplexity(model, WINDOWS)

    def measure(options: Options, seed: int) -> list[float]:
        qmodel = apply(model, data.opt_calibration(seed, 16), options, seed)
        perplexity = data.perplexity(qmodel, WINDOWS)
        return [perplexity, 100 * (perplexity / base - 1)]

    return Table(
        "fidelity_attention_opt",
        "Small OPT, WikiText-2 test: softmax alone, and everything",
        ["softmax", "perplexity", "over float"],
        ["{:.2f}", "{:+.2f} %"],
        [*SOFTMAX, *EVERYTHING_OPT],
        measure,
        f"7 M parameters, the first {WINDOWS} windows of 256 tokens, causal masks; calibrated on "
        "16 windows of WikiText-2 valid",
        ["float32", f"{base:.2f}", ""],
        seeds_where_calibrated,
    )


TABLES = {"vit": vit, "ranges": ranges, "softmax": softmax, "minilm": minilm, "opt": opt}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("name", choices=[*TABLES, "all"])
    parser.add_argument("--resume", action="store_true", help="keep the figures in the file")
    options = parser.parse_args()
    for key in TABLES if options.name == "all" else (options.name,):
        TABLES[key]().fill(resume=options.resume)


if __name__ == "__main__":
    main()
