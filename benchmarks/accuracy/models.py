"""What quantization costs real models: MiniLM on STS-B, a small OPT on WikiText-2, a small ViT.

    python -m benchmarks.accuracy.models minilm | opt | vit | reviews | ablation | all
                                         [--only ROW ...] [--resume]

writes benchmarks/results/fidelity_<name>.json. Every row is the mean over calibration draws with
seeds 0, 1 and 2, but for the ablation's and the reviews', which are of seed 0. --only measures the
named rows and keeps the others of the file; --resume measures what the file does not hold yet.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from unittest.mock import patch

from benchmarks import data
from benchmarks.accuracy.table import Cases, Measure, Options, Table, one_seed, quantize

WINDOWS = 150  # of the 1,391 of WikiText-2 test
PLAIN: Options = {"method": "none", "rounding": "nearest", "ranges": "minmax"}
OS_PLUS: Options = {"method": "os+", "rounding": "nearest"}

MINILM: Cases = [
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
ROTATE: Options = {"w": 4, "a": 4, "method": "rotate"}
EQUALIZE: Options = {"w": 4, "a": 4, "method": "equalize+rotate"}
ABLATION: Cases = [
    ("min-max, nearest", {"w": 4, "a": 4, **PLAIN}),
    ("OS+, nearest", {"w": 4, "a": 4, **OS_PLUS}),
    ("rotate, min-max, nearest", {**ROTATE, "rounding": "nearest", "ranges": "minmax"}),
    ("rotate, weighted MSE, nearest", {**ROTATE, "rounding": "nearest"}),
    ("rotate, GPTQ", {**ROTATE, "rounding": "gptq"}),
    ("rotate, AdaRound", {**ROTATE, "rounding": "adaround"}),
    ("rotate, FlexRound", {**ROTATE, "rounding": "flexround"}),
    ("equalize, rotate, nearest", {**EQUALIZE, "rounding": "nearest"}),
    ("equalize, rotate, GPTQ alone", {**EQUALIZE, "without": ("fit", "descent")}),
    ("equalize, rotate, GPTQ and descent", {**EQUALIZE, "without": ("fit",)}),
    ("equalize, rotate, GPTQ and fit", {**EQUALIZE, "without": ("descent",)}),
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
OFF = {"fit": ("_least_squares", "FIT_DAMP", 1e12), "descent": ("_coordinates", "ROUNDS", 0)}
REVIEWS: Cases = [
    ("W8A8", {"w": 8, "a": 8}),
    ("W4A8", {"w": 4, "a": 8}),
    ("W4A4 min-max, nearest", {"w": 4, "a": 4, **PLAIN}),
    ("W4A4 OS+, nearest", {"w": 4, "a": 4, **OS_PLUS}),
    ("W4A4", {"w": 4, "a": 4}),
    ("W6A6", {"w": 6, "a": 6}),
    ("W4A16 g128", {"w": 4, "a": 16, "group_size": 128}),
]
OPT: Cases = [
    ("W8A8 min-max, nearest", {"w": 8, "a": 8, **PLAIN}),
    ("W8A8 OS+, nearest", {"w": 8, "a": 8, **OS_PLUS}),
    ("W8A8", {"w": 8, "a": 8}),
    ("W4A8", {"w": 4, "a": 8}),
    ("W4A4 token, OS+, nearest", {"w": 4, "a": 4, "activations": "token", **OS_PLUS}),
    ("W4A4", {"w": 4, "a": 4}),
    ("W4A4 token", {"w": 4, "a": 4, "activations": "token"}),
    ("W4A16 g128", {"w": 4, "a": 16, "group_size": 128}),
]
VIT: Cases = [
    ("W8A8 min-max, nearest", {"w": 8, "a": 8, **PLAIN}),
    ("W8A8", {"w": 8, "a": 8}),
    ("W6A6", {"w": 6, "a": 6}),
    ("W4A8", {"w": 4, "a": 8}),
    ("W4A4 min-max, nearest", {"w": 4, "a": 4, **PLAIN}),
    ("W4A4", {"w": 4, "a": 4}),
]


def minilm() -> Table:
    """Cosine of sentence embeddings to the float model's, and Spearman on STS-B test."""
    measure, base = similarity()
    return Table(
        "fidelity_minilm",
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

    def timed(options: Options, seed: int) -> list[float]:
        start = time.perf_counter()
        figures = measure(options, seed)
        return [*figures, time.perf_counter() - start]

    return Table(
        "fidelity_ablation",
        "MiniLM at W4A4: what each part is worth",
        ["method, ranges and rounding", "cosine", "worst", "STS-B Spearman", "s"],
        ["{:.4f}", "{:.3f}", "{:.2f}", "{:.0f}"],
        ABLATION,
        timed,
        "as the table of MiniLM, one calibration draw; seconds with evaluation, one thread of a "
        "machine that had other work",
        seeds=one_seed,
    )


def similarity() -> tuple[Measure, float]:
    """Of MiniLM: the measurement, and the float model's Spearman."""
    model, tokenizer = data.minilm()
    task = data.stsb_test(tokenizer)
    wanted = task.embeddings(model)

    def measure(options: Options, seed: int) -> list[float]:
        options = dict(options)
        calib = data.stsb_calibration(seed, options.pop("sentences", 256))
        with without(options.pop("without", ())):
            qmodel = quantize(model, calib, options, seed, tokenizer=tokenizer)
        got = task.embeddings(qmodel)
        cosines = (got * wanted).sum(-1)
        return [float(cosines.mean()), float(cosines.min()), task.spearman(got)]

    return measure, task.spearman(wanted)


@contextmanager
def without(parts: Sequence[str]) -> Iterator[None]:
    """Leaves parts of GPTQ out: the fit to the float output, the descent behind it."""
    with ExitStack() as stack:
        for part in parts:
            file, name, value = OFF[part]
            stack.enter_context(patch.object(import_module(f"qtk.round.{file}"), name, value))
        yield


def reviews() -> Table:
    """A second data set: film reviews, far from the calibration sentences."""
    model, tokenizer = data.minilm()
    task = data.reviews(tokenizer)
    wanted = task.embeddings(model)

    def measure(options: Options, seed: int) -> list[float]:
        calib = data.stsb_calibration(seed)
        got = task.embeddings(quantize(model, calib, options, seed, tokenizer=tokenizer))
        cosines = (got * wanted).sum(-1)
        return [float(cosines.mean()), float(cosines.min()), task.probe(got)]

    return Table(
        "fidelity_reviews",
        "MiniLM sentence embeddings, film reviews",
        ["scheme", "cosine", "worst", "linear probe %"],
        ["{:.4f}", "{:.3f}", "{:.2f}"],
        REVIEWS,
        measure,
        "the first 1,000 positive and 1,000 negative sentences of the MR set, calibrated on 256 "
        "sentences of STS-B train; the probe is a ridge classifier on the embeddings of every "
        "other sentence, judged on the rest",
        base=["float32", "1", "1", f"{task.probe(wanted):.2f}"],
        seeds=one_seed,
    )


def opt() -> Table:
    """Perplexity of the small OPT after large models' outlier channels were put in."""
    model, _ = data.opt()
    model = data.inject_outliers(model)
    base = data.perplexity(model, WINDOWS)

    def measure(options: Options, seed: int) -> list[float]:
        qmodel = quantize(model, data.opt_calibration(seed), options, seed)
        perplexity = data.perplexity(qmodel, WINDOWS)
        return [perplexity, 100 * (perplexity / base - 1)]

    return Table(
        "fidelity_opt",
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

    def measure(options: Options, seed: int) -> list[float]:
        images, _ = data.cifar10("train", 128, seed)
        calib = [{"pixel_values": part} for part in images.split(32)]
        accuracy = data.accuracy(quantize(model, calib, options, seed), pixels, labels)
        return [accuracy, accuracy - base]

    return Table(
        "fidelity_vit",
        "Small ViT, CIFAR-10 (JPEG) test, all 10,000 images",
        ["scheme", "top-1 %", "to float"],
        ["{:.2f}", "{:+.2f}"],
        VIT,
        measure,
        "2.7 M parameters, 32x32 pixels; calibrated on 128 training images",
        base=["float32", f"{base:.2f}", ""],
    )


TABLES = {"minilm": minilm, "opt": opt, "vit": vit, "reviews": reviews, "ablation": ablation}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("name", choices=[*TABLES, "all"])
    parser.add_argument("--only", nargs="+", default=[], help="names of rows")
    parser.add_argument("--resume", action="store_true", help="keep the figures in the file")
    options = parser.parse_args()
    for key in TABLES if options.name == "all" else (options.name,):
        TABLES[key]().fill(options.only, options.resume)


if __name__ == "__main__":
    main()
