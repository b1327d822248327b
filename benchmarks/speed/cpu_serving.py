"""Serving on a CPU: sentences a second at mixed lengths, and the latency of concurrent requests.

    python -m benchmarks.speed.cpu_serving [MODEL] [--only CONTENDER ...]

Sentences have lengths as a text has them (log-normal, median 24 tokens, 4 to 128). For throughput
they are sorted into buckets, padded to the bucket's tokens and run in batches of one bucket; for
latency four clients send one sentence at a time, padded to its bucket, and the 95th percentile of
all requests is reported. Contenders take turns, each in a process of its own (`cpu_contenders.py`).
Writes benchmarks/results/cpu_serving_<model>.json.
"""

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.result import result, versions_of, write
from benchmarks.speed.cpu_contenders import (
    BATCH,
    CONTENDERS,
    MODELS,
    SERVED,
    TINY,
    Size,
    buckets_of,
)
from benchmarks.speed.cpu_models import PACKAGES, PAUSE, start
from qtk_kernels.dispatch import HAS_INT8

CLIENTS = 4
SENTENCES, ROUNDS = 512, 5
FEW, ONCE = 32, 1  # of a tiny model
SEVEN = ("qtk W7A8", "qtk W7A8, qtk.compile in buckets")


def lengths(count: int, most: int) -> list[int]:
    """Tokens of so many sentences, the same in every run."""
    drawn = np.random.default_rng(0).lognormal(math.log(24), 0.6, count)
    return [int(n) for n in drawn.clip(4, most)]


def bucket(n: int, buckets: Sequence[int]) -> int:
    return next(size for size in buckets if n <= size)


def batches(tokens: Sequence[int], buckets: Sequence[int]) -> list[Size]:
    """Sizes of the batches, sentences sorted into buckets; the last of each bucket is smaller."""
    found: list[Size] = []
    for size in buckets:
        count = sum(bucket(n, buckets) == size for n in tokens)
        found += [(min(BATCH, count - i), size) for i in range(0, count, BATCH)]
    return found


def run(model: str, only: Sequence[str] = ()) -> dict[str, Any]:
    buckets, small = buckets_of(model), model in TINY
    tokens = lengths(FEW if small else SENTENCES, buckets[-1])
    batched = batches(tokens, buckets)
    single = [bucket(n, buckets) for n in tokens]
    names = list(only or (SERVED if HAS_INT8 else (*SERVED, *SEVEN)))
    workers, missing = start(model, names, [(1, buckets[0]), *sorted(set(batched))])
    rates: dict[str, list[float]] = {name: [] for name in workers}
    waits: dict[str, list[float]] = {name: [] for name in workers}
    try:
        for i in range((ONCE if small else ROUNDS) + 1):
            for name, worker in workers.items():
                time.sleep(PAUSE)
                seconds = worker.ask("throughput", batched)
                waited = worker.ask("latencies", single, CLIENTS)
                if i:  # the first round warms up
                    rates[name].append(len(tokens) / seconds)
                    waits[name] += waited
    finally:
        for worker in workers.values():
            worker.stop()
    rows = [
        [name, f"{statistics.median(rates[name]):.1f}", f"{np.percentile(waits[name], 50):.2f}",
         f"{np.percentile(waits[name], 95):.2f}"] for name in workers
    ]  # fmt: skip
    notes = [
        f"{len(tokens)} sentences of 4 to {buckets[-1]} tokens, buckets of "
        f"{', '.join(map(str, buckets))}, batches of {BATCH} for throughput, {CLIENTS} clients "
        f"of one sentence for latency; {torch.get_num_threads()} threads in each contender",
        *(f"{name} could not run ({why})" for name, why in missing.items()),
    ]
    return result(
        f"Serving {(MODELS | TINY)[model][0]}, on a CPU",
        ["", "sentences a second", "median ms, 4 clients", "95th percentile ms"],
        rows, "; ".join(notes), versions=versions_of(*PACKAGES),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", nargs="?", default="minilm", choices=["minilm", "bert", *TINY])
    parser.add_argument("--only", nargs="+", default=(), choices=list(CONTENDERS), metavar="NAME",
                        help="print the rows of these, and write nothing")  # fmt: skip
    told = parser.parse_args()
    found = run(told.model, told.only)
    print(*found["rows"], found["notes"], sep="\n")
    if not told.only and told.model not in TINY:
        write(f"cpu_serving_{told.model}", found)


if __name__ == "__main__":
    main()
