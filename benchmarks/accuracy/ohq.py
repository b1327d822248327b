"""Whether bits chosen by `qtk.search` are worth their search: MiniLM and the small ViT.

    python -m benchmarks.accuracy.ohq rank | bytes | budget | latency ...
                                      [--model minilm | vit] [--preset PRESET] [--draws N]

writes benchmarks/results/ohq.json, whose other figures stay.

rank     predicted against measured loss of 30 random assignments
bytes    held-out loss at equal bytes: found, one scheme for all, random, by rank
budget   how often an accuracy budget holds on data that nobody saw
latency  predicted against measured latency of what was found, and the seconds that a search takes
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn

import qtk
from benchmarks import data
from benchmarks.result import read, result, write
from qtk.mixed_precision import budget as budgets
from qtk.mixed_precision.allocate import allocate, total
from qtk.mixed_precision.loss import Judge
from qtk.mixed_precision.search import Search
from qtk.mixed_precision.space import Chosen, Pair, Space
from qtk.observe import Batch
from qtk.observe.batches import prepare

SCHEMES: list[Pair] = [(8, 8), (6, 8), (5, 8), (4, 8), (4, 4), (16, 16)]
SEEDS = (0, 1, 2)
ASSIGNMENTS = 30
CALIBRATION = 256  # samples, of which half are held back
HELD_OUT = {"minilm": 512, "vit": 256}  # samples of the test split
LEVELS: list[tuple[Pair, float]] = [((6, 8), 0.5), ((5, 8), 0.25)]  # with auto's share at W4A8
BUDGETS = {"minilm": ["cosine 0.99", "cosine 0.98"], "vit": ["kl 0.01", "drop 4 %"]}
COLUMNS = ["figure", "MiniLM", "small ViT"]
NOTES = (
    "the search draws 256 samples of the training split and holds back half; random assignments "
    "and those at equal bytes are quantized on 64 others, the latter on three draws, after one "
    "search; held-out loss is 1 - cosine (MiniLM, 512 sentences of STS-B test) or KL in nats "
    "(ViT, 256 test images); the machine had other work while it was measured"
)


@dataclass(frozen=True, eq=False)
class Task:
    """A model, calibration data by seed, and data that no search sees."""

    column: int
    model: nn.Module
    calibration: Callable[[int], list[Batch]]
    judge: Judge


def minilm() -> Task:
    model, tokenizer = data.minilm()
    sentences = data.stsb_sentences("test", 0, HELD_OUT["minilm"])
    judge = Judge.of(model, prepare(model, sentences, tokenizer))

    @cache
    def calibration(seed: int) -> list[Batch]:
        return prepare(model, data.stsb_calibration(seed), tokenizer)

    return Task(1, model, calibration, judge)


def vit() -> Task:
    model = data.vit()

    def images(split: str, n: int, seed: int) -> list[Batch]:
        pixels, _ = data.cifar10(split, n, seed)
        return [{"pixel_values": part} for part in pixels.split(32)]

    @cache
    def calibration(seed: int) -> list[Batch]:
        return images("train", CALIBRATION, seed)

    return Task(2, model, calibration, Judge.of(model, images("test", HELD_OUT["vit"], 0)))


TASKS = {"minilm": minilm, "vit": vit}


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
    rho = float(spearmanr(*zip(*pairs, strict=True)).statistic)
    keep(f"Spearman of predicted and measured loss, {draws} random assignments, {preset}", task,
         f"{rho:.3f}")  # fmt: skip


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
            best = allocate(effects, [(space.bytes(), limit)])
            assert best is not None
            contenders = {
                "found": best,
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
    """On held-out data, a draw of the calibration data each."""
    name = "minilm" if task.column == 1 else "vit"
    for text in BUDGETS[name]:
        kept, sizes = 0, []
        (asked,) = budgets.read(text)
        for seed in range(draws):
            found = search(task, text, seed, preset, verify=True)
            chosen = found.point.chosen
            loss = measured(task, found.space, chosen, seed, preset, asked.metric, found.calib)
            whole = total(found.space.bytes(), found.space.uniform((8, 8)))
            kept += loss <= asked.limit
            sizes.append(found.point.bytes / whole)
            print(seed, text, loss, loss <= asked.limit, sizes[-1], flush=True)
            mean = f"{kept} of {seed + 1}, {statistics.mean(sizes):.2f}x bytes"
            keep(f"{text} kept on unseen data, and bytes of W8A8's, {preset}", task, mean)


def latency(task: Task, preset: str, draws: int) -> None:
    """Of the assignment that was chosen and of some of the front."""
    start, spent = time.perf_counter(), time.process_time()
    found = search(task, "0.75x bytes", 0, preset, verify=True)
    wall, spent = time.perf_counter() - start, time.process_time() - spent
    keep(f"seconds of a search, verified, {preset}", task, f"{wall:.0f} ({spent:.0f} of CPU)")
    for point in found.checked:
        assert point.measured is not None
        text = f"{1e3 * point.seconds:.1f} / {1e3 * point.measured.seconds:.1f}"
        keep(f"latency, predicted / measured, ms: {point.name} at 0.75x bytes", task, text)
    print(found.table(), found.latencies.table(), sep="\n\n")
    keep("fewer bits faster here", task, "yes" if found.latencies.faster else "no")


PARTS = {"rank": rank, "bytes": equal_bytes, "budget": budget, "latency": latency}


@cache
def search(task: Task, text: str, seed: int, preset: str, verify: bool | int = False) -> Search:
    return qtk.search(
        task.model, text, task.calibration(seed), schemes=SCHEMES, seed=seed, preset=preset,
        verify=verify, progress=False,
    )  # fmt: skip


@torch.no_grad()
def measured(
    task: Task, space: Space, chosen: Chosen, seed: int, preset: str, metric: str | None = None,
    calib: Sequence[Batch] | None = None,
) -> float:  # fmt: skip
    """The held-out loss of an assignment, quantized as a user would."""
    calib = task.calibration(seed + 100)[3::4] if calib is None else calib  # two batches, long ones
    qmodel = qtk.quantize(
        task.model, calib=calib, bits=space.bits(chosen), preset=preset, progress=False
    )
    return float(task.judge.losses(qmodel, metric).mean())


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
    rows = {row[0]: row for row in kept.get("rows", [])}
    row = rows.setdefault(figure, [figure, "-", "-"])
    row[task.column] = cell
    write(
        "ohq", result("Bits chosen under a budget", COLUMNS, list(rows.values()), NOTES, kept=kept)
    )
    print(figure, cell, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("parts", choices=list(PARTS), nargs="+")
    parser.add_argument("--model", choices=list(TASKS), default="minilm")
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--draws", type=int, default=ASSIGNMENTS)
    options = parser.parse_args()
    task = TASKS[options.model]()
    for part in options.parts:
        PARTS[part](task, options.preset, options.draws)


if __name__ == "__main__":
    main()
