"""Whether bits chosen by `qtk.search` are worth their search: MiniLM and the small ViT.

    python -m benchmarks.accuracy.ohq rank | bytes | budget | latency | seconds | faster ...
                                      [--model minilm | vit] [--preset PRESET] [--draws N]
                                      [--folder FOLDER]

writes benchmarks/results/ohq.json, whose other figures stay.

rank     predicted against measured loss of 30 random assignments
bytes    held-out loss at equal bytes: found, one scheme for all, random, by rank
budget   how often an accuracy budget holds on unseen data, of the same source and of a test split
latency  predicted against measured latency
seconds  that a search takes
faster   points and latency of what is found for .85 of W8A8's latency and no more bytes
"""

import argparse
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import qtk
from benchmarks import data
from benchmarks.result import read, result, write
from qtk.errors import SchemeError
from qtk.mixed_precision import budget as budgets
from qtk.mixed_precision.allocate import SLACK, total
from qtk.mixed_precision.data import Data, full_rows
from qtk.mixed_precision.loss import Judge
from qtk.mixed_precision.result import Search
from qtk.mixed_precision.search import OPTIONS
from qtk.mixed_precision.space import Chosen, Pair, Space, name_of
from qtk.models import describe
from qtk.observe import Batch
from qtk.observe.batches import prepare
from qtk.timing import race

SCHEMES: list[Pair] = [(8, 8), (6, 8), (5, 8), (4, 8), (4, 4), (16, 16)]
SEEDS = (0, 1, 2)
ASSIGNMENTS = 30
CALIBRATION = 256  # samples, of which half are held back
HELD_OUT = {"minilm": 512, "vit": 256}  # samples of the test split
ACCURACY_IMAGES = 1000  # that points of the ViT are measured on
LEVELS: list[tuple[Pair, float]] = [((6, 8), 0.5), ((5, 8), 0.25)]  # with auto's share at W4A8
BUDGETS = {"minilm": ["cosine 0.99", "cosine 0.98"], "vit": ["kl 0.01", "drop 4 %"]}
COLUMNS = ["figure", "MiniLM", "small ViT", "BERT-base width, 2 layers"]
NOTES = (
    "the search draws 256 samples of the training split and holds back half; random assignments "
    "and those at equal bytes are quantized on 64 others, the latter on three draws, after one "
    "search; held-out loss is 1 - cosine (MiniLM, 512 sentences of STS-B test) or KL in nats "
    "(ViT, 256 test images); points are Spearman on STS-B test or accuracy on 1,000 test images; "
    "the machine had other work while it was measured"
)


@dataclass(frozen=True, eq=False)
class Task:
    """A model, calibration data by seed, and data that no search sees."""

    column: int
    model: nn.Module
    calibration: Callable[[int], list[Batch]]
    judge: Judge
    alike: Callable[[int], Judge]  # on other samples of the split that a seed's calibration is of
    points: Callable[[nn.Module], float] | None = None
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp()))  # what searches keep


def minilm() -> Task:
    model, tokenizer = data.minilm()
    sentences = data.stsb_sentences("test", 0, HELD_OUT["minilm"])
    judge = Judge.of(model, prepare(model, sentences, tokenizer))

    @cache
    def calibration(seed: int) -> list[Batch]:
        return prepare(model, data.stsb_calibration(seed), tokenizer)

    def alike(seed: int) -> Judge:
        seen = {*data.stsb_calibration(seed)}
        others = data.stsb_sentences("train", 1000 + seed, HELD_OUT["minilm"])
        return Judge.of(model, prepare(model, [s for s in others if s not in seen], tokenizer))

    def points(quantized: nn.Module) -> float:
        pairs = data.stsb_test(tokenizer)
        return pairs.spearman(pairs.embeddings(quantized))

    return Task(1, model, calibration, judge, alike, points)


def vit() -> Task:
    model = data.vit()

    def images(split: str, n: int, seed: int) -> list[Batch]:
        pixels, _ = data.cifar10(split, n, seed)
        return [{"pixel_values": part} for part in pixels.split(32)]

    @cache
    def calibration(seed: int) -> list[Batch]:
        return images("train", CALIBRATION, seed)

    def points(quantized: nn.Module) -> float:
        pixels, labels = data.cifar10("test", ACCURACY_IMAGES, 1)
        answers = torch.cat([quantized(part).logits.argmax(-1) for part in pixels.split(64)])
        return 100 * float((answers == labels).double().mean())

    test = Judge.of(model, images("test", HELD_OUT["vit"], 0))
    return Task(2, model, calibration, test, lambda seed: test, points)  # splits drawn from one set


def bert() -> Task:
    """Random weights: for latency alone."""
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(num_hidden_layers=2, vocab_size=1000)).eval()
    ids = torch.randint(1000, (32, 64), generator=torch.Generator().manual_seed(0))
    batch: Batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    judge = Judge.of(model, [batch])
    return Task(3, model, lambda seed: [batch], judge, lambda seed: judge)


TASKS = {"minilm": minilm, "vit": vit, "bert": bert}


def rank(task: Task, preset: str, draws: int) -> None:
    """Of random assignments of all schemes."""
    from scipy.stats import spearmanr

    found = search(task, "0.75x bytes", 0, preset)
    rng = np.random.default_rng(0)
    pairs = []
    for i in range(draws):
        chosen = anything(found.space, rng)
        loss = measured(task, found.space, chosen, 0, preset)
        pairs.append((found.sensitivity.predict(chosen), loss))
        print(i, *pairs[-1], f"{time.process_time():.0f} s", flush=True)
        if i >= 9:
            rho = float(spearmanr(*zip(*pairs, strict=True)).statistic)
            cell = f"{rho:.3f} of {i + 1}"
            keep(f"Spearman of predicted and measured loss, random assignments, {preset}", task,
                 cell)  # fmt: skip


def equal_bytes(task: Task, preset: str, draws: int) -> None:
    """At the bytes of one scheme for all."""
    losses: dict[str, list[float]] = {}
    found = search(task, "0.75x bytes", 0, preset)
    space, effects = found.space, found.sensitivity.effects
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        for pair, share in LEVELS:
            uniform = space.uniform(pair)
            limit = total(space.bytes(), uniform)
            text = f"{limit * (1 + SLACK):.0f} B"
            contenders = {
                "found": search(task, text, 0, preset, verify=True).point.chosen,
                "one scheme": uniform,
                "random": random_within(space, limit, rng),
                "rank by error a weight": ranked(space, effects, share),
            }
            for name, chosen in contenders.items():
                loss = measured(task, space, chosen, seed, preset)
                level = f"held-out loss in the bytes of W{pair[0]}A{pair[1]}, {preset}: {name}"
                losses.setdefault(level, []).append(loss)
                size = total(space.bytes(), chosen) / limit
                print(seed, level, loss, f"bytes {size:.3f}", flush=True)
        for level, values in losses.items():
            few = f" ({len(values)} of {len(SEEDS)} draws)" if len(values) < len(SEEDS) else ""
            keep(level, task, f"{statistics.mean(values):.5f}{few}")


def budget(task: Task, preset: str, draws: int) -> None:
    """A draw of the calibration data each; goes on after those in the file."""
    name = "minilm" if task.column == 1 else "vit"
    texts = {text: f"{text} kept on unseen data, and bytes of W8A8's, {preset}"
             for text in BUDGETS[name]}  # fmt: skip
    first = min(_so_far(figure, task)[0] for figure in texts.values())
    for seed in range(first, draws):  # both budgets of a draw: they share its losses
        for text, figure in texts.items():
            done, kept, share, elsewhere = _so_far(figure, task)
            if done > seed:
                continue
            (asked,) = budgets.read(text)
            found = search(task, text, seed, preset, verify=True)
            model = quantized(task, found.space, found.point.chosen, found.calib, preset)
            loss, other = (
                float(judge.losses(model, asked.metric).mean())
                for judge in (task.alike(seed), task.judge)
            )
            size = found.point.bytes / total(found.space.bytes(), found.space.uniform((8, 8)))
            kept, elsewhere = kept + (loss <= asked.limit), elsewhere + (other <= asked.limit)
            share += (size - share) / (seed + 1)
            print(seed, text, found.point.measured, loss, other, size, flush=True)
            cell = f"{kept} of {seed + 1}, {share:.3f}x bytes"
            keep(figure, task, cell if name == "vit" else f"{cell} ({elsewhere} on the test split)")


def _so_far(figure: str, task: Task) -> tuple[int, int, float, int]:
    """Draws in the file, those that kept the budget, mean share of bytes; kept on a test split."""
    rows = {row[0]: row for row in read("ohq").get("rows", [])}
    cell = rows.get(figure, ["-"] * len(COLUMNS))[task.column]
    told = re.fullmatch(r"(\d+) of (\d+), (.+)x bytes(?: \((\d+) .*\))?", cell)
    if not told:
        return 0, 0, 0.0, 0
    return int(told[2]), int(told[1]), float(told[3]), int(told[4] or told[1])


def seconds(task: Task, preset: str, draws: int) -> None:
    """Of a whole search, with what was chosen quantized and measured."""
    start, spent = time.perf_counter(), time.process_time()
    found = qtk.search(
        task.model, "0.75x bytes", task.calibration(0), preset=preset, progress=False
    )
    wall, spent = time.perf_counter() - start, time.process_time() - spent
    keep(f"seconds of a search, verified, {preset}", task, f"{wall:.0f} ({spent:.0f} of CPU)")
    print(found.table(), found.latencies.table(), sep="\n\n")


@torch.no_grad()
def latency(task: Task, preset: str, draws: int) -> None:
    """Of one scheme for all and of a mix, beside each other; batches of 16."""
    calib = task.calibration(0)[-1:]
    found = qtk.bench_ops(task.model, calib, schemes=SCHEMES, preset=preset, progress=False)
    space = Space.of(task.model, describe(task.model), SCHEMES, calib, {**OPTIONS, "preset": preset,
                     "seed": 0})  # fmt: skip
    rng = np.random.default_rng(0)
    mixed = tuple(int(s) for s in rng.integers(0, len(SCHEMES), len(space.units)))
    integers = tuple(int(s) for s in rng.integers(0, len(SCHEMES) - 1, len(space.units)))
    assignments = {
        "W8A8": space.uniform((8, 8)), "W4A8": space.uniform((4, 8)),
        "W4A4": space.uniform((4, 4)), "mixed integers": integers, "mixed, some float": mixed,
    }  # fmt: skip
    batch = full_rows(Data.of(task.model, calib, None, 0, ()).seen[-1], 16)
    models = {
        name: qtk.quantize(task.model, calib=calib, bits=space.bits(chosen), preset=preset,
                           progress=False)
        for name, chosen in assignments.items()
    }  # fmt: skip
    calls: dict[str, Callable[[], Any]] = {
        name: partial(lambda m: m(**batch), model) for name, model in models.items()
    }
    calls["float"] = lambda: task.model(**batch)
    times = race(calls, 60, limit=60.0)
    assignments["float"] = space.uniform((16, 16))
    whole = times["float"] / found.float_seconds  # a machine that is slower now is for both
    for name, chosen in assignments.items():
        predicted, got = total(found.seconds, chosen) + found.rest, times[name] / whole
        off = 100 * (predicted / got - 1)
        cell = f"{1e3 * predicted:.1f} / {1e3 * got:.1f} ({off:+.0f} %)"
        keep(f"latency, predicted / measured, ms: {name}", task, cell)
    keep("a scheme of fewer bits is faster than W8A8 here", task, "yes" if found.faster else "no")
    print(found.table())


@torch.no_grad()
def faster(task: Task, preset: str, draws: int) -> None:
    """Both models quantized on the same data and timed beside each other, batches of 16."""
    assert task.points is not None, "needs a model with weights that were learned"
    cap = os.environ.get("ONEDNN_MAX_CPU_ISA")
    where = f", oneDNN capped at {cap}" if cap else ""
    figure = f"0.85x latency, 1x bytes, {preset}{where}: points and latency beside W8A8's"
    calib = task.calibration(0)
    try:
        found = search(task, "0.85x latency, 1x bytes", 0, preset, verify=True)
    except SchemeError as error:  # nothing is so much faster here
        keep(figure, task, str(error))
        return
    print(found.table(), flush=True)
    models: dict[str, Any] = {
        name: qtk.quantize(task.model, calib=calib, bits=bits, preset=preset, progress=False)
        for name, bits in (
            ("found", found.bits), ("W8A8", found.space.bits(found.space.uniform((8, 8)))),
        )
    }  # fmt: skip
    batch = full_rows(Data.of(task.model, calib, None, 0, ()).seen[-1], 16)
    calls = {name: partial(lambda m: m(**batch), model) for name, model in models.items()}
    times = race(calls, 60, limit=60.0)
    points = {name: task.points(model) for name, model in models.items()}
    print(points, times)
    w8a8 = next(point for point in found.references if point.name == name_of((8, 8)))
    cell = (
        f"{points['found'] - points['W8A8']:+.2f} ({points['found']:.2f}, "
        f"{points['W8A8']:.2f}), {100 * (times['found'] / times['W8A8'] - 1):+.0f} %, predicted "
        f"{100 * (found.point.seconds / w8a8.seconds - 1):+.0f} %"
    )
    keep(figure, task, cell)


PARTS = {
    "rank": rank, "bytes": equal_bytes, "budget": budget, "latency": latency, "seconds": seconds,
    "faster": faster,
}  # fmt: skip


@cache
def search(task: Task, text: str, seed: int, preset: str, verify: bool | int = False) -> Search:
    return qtk.search(
        task.model, text, task.calibration(seed), schemes=SCHEMES, seed=seed, preset=preset,
        verify=verify, latencies=task.folder / "latencies.json",
        resume=task.folder / f"{task.column}-{seed}-{preset}", progress=False,
    )  # fmt: skip


@torch.no_grad()
def measured(
    task: Task, space: Space, chosen: Chosen, seed: int, preset: str
) -> float:  # fmt: skip
    """The held-out loss of an assignment."""
    calib = task.calibration(seed + 100)[3::4]  # two batches, long ones
    return float(task.judge.losses(quantized(task, space, chosen, calib, preset)).mean())


def quantized(
    task: Task, space: Space, chosen: Chosen, calib: Sequence[Batch] | None, preset: str
) -> nn.Module:
    """As a user would."""
    made: nn.Module = qtk.quantize(
        task.model, calib=calib, bits=space.bits(chosen), preset=preset, progress=False
    )
    return made


def anything(space: Space, rng: Any) -> Chosen:
    """Any integer scheme for each unit, of some of them, so that losses differ widely."""
    some = rng.permutation(len(space.schemes) - 1)[: rng.integers(2, len(space.schemes))]
    return tuple(int(s) for s in rng.choice(some, len(space.units)))


def random_within(space: Space, limit: float, rng: Any) -> Chosen:
    """A random assignment of W8A8 to W4A8 that uses the bytes up to a fiftieth."""
    while True:
        chosen = tuple(int(s) for s in rng.integers(0, 4, len(space.units)))
        if 0.98 * limit <= total(space.bytes(), chosen) <= limit:
            return chosen


def ranked(space: Space, effects: Any, share: float) -> Chosen:
    """W8A8 for the units of the largest error a weight, W4A8 for the rest: the rule of a rank."""
    wide, narrow = (space.schemes.index(pair) for pair in ((8, 8), (4, 8)))
    sizes = [unit.weights for unit in space.units]
    left, chosen = share * sum(sizes), [narrow] * len(sizes)
    for u in sorted(range(len(sizes)), key=lambda u: -effects[u, narrow] / sizes[u]):
        if sizes[u] <= left:
            left -= sizes[u]
            chosen[u] = wide
    return tuple(chosen)


def keep(figure: str, task: Task, cell: str) -> None:
    """Writes one figure, the others of the file as they are."""
    kept = read("ohq")
    blank = ["-"] * len(COLUMNS)
    kept_rows = {row[0]: [*row, *blank][: len(COLUMNS)] for row in kept.get("rows", [])}
    row = kept_rows.setdefault(figure, [figure, "-", "-", "-"])
    row[task.column] = cell
    write(
        "ohq",
        result("Bits chosen under a budget", COLUMNS, list(kept_rows.values()), NOTES, kept=kept),
    )
    print(figure, cell, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("parts", choices=list(PARTS), nargs="+")
    parser.add_argument("--model", choices=list(TASKS), default="minilm")
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--draws", type=int, default=ASSIGNMENTS)
    parser.add_argument("--folder", type=Path, help="keeps losses and latencies between runs")
    options = parser.parse_args()
    task = TASKS[options.model]()
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
        task = replace(task, folder=options.folder)
    for part in options.parts:
        PARTS[part](task, options.preset, options.draws)


if __name__ == "__main__":
    main()
