"""Speed of whole models on a CPU: float against quantized, qtk against its peers, interleaved.

    python -m benchmarks.speed.cpu_models [MODEL ...] [--only CONTENDER ...]

Every contender has a process of its own (`cpu_contenders.py`), and they take turns, so that a noisy
machine is noisy for all of them. Medians are reported, and the ratio to float32 in the same run.
Outputs are checked on the way: a model that is fast and wrong does not pass. What cannot run is
named with its reason; the peers are `pip install onnx onnxruntime onnxscript openvino nncf torchao
optimum-quanto`. The model "tiny" tries the benchmark itself. Writes
benchmarks/results/cpu_<model>.json, and the picture of `cpu_plot.py`.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.nn.functional import cosine_similarity

from benchmarks.result import RESULTS, result, versions_of, write
from benchmarks.speed.cpu_contenders import (
    BASIC,
    CONTENDERS,
    IN_BUCKETS,
    MAIN,
    MODELS,
    SEVEN,
    SIZES,
    TINY,
    Size,
    Worker,
)
from benchmarks.speed.cpu_plot import plot
from qtk_kernels.dispatch import HAS_INT8

ROUNDS = 7
PAUSE = 0.05  # seconds before each turn, for the threads of the one before to fall asleep
PACKAGES = (
    "qtk", "torch", "transformers", "torchao", "onnxruntime", "openvino", "nncf", "optimum-quanto",
)  # fmt: skip


def start(
    model: str, names: Sequence[str], sizes: Sequence[Size]
) -> tuple[dict[str, Worker], dict[str, str]]:
    """A worker for each contender that runs here, compiled for every size; why others do not."""
    workers: dict[str, Worker] = {}
    missing: dict[str, str] = {}

    def one(name: str) -> None:
        worker = Worker(model, name)
        try:
            if worker.error is not None:
                raise RuntimeError(worker.error)
            for size in sizes:
                worker.ask("output", size)
            workers[name] = worker
        except RuntimeError as error:
            missing[name] = str(error)
            worker.stop()

    with ThreadPoolExecutor(max_workers=2) as pool:  # compilers use one core each
        list(pool.map(one, names))
    return {name: workers[name] for name in names if name in workers}, missing


def measure(workers: dict[str, Worker], size: Size) -> dict[str, float]:
    """Median milliseconds of each, in turns; checks every output against float32's."""
    want = torch.from_numpy(workers["float32"].ask("output", size))
    for name, worker in workers.items():
        got = torch.from_numpy(worker.ask("output", size))
        cosine = cosine_similarity(want, got, dim=-1).mean()
        assert cosine > 0.6, f"{name} computes something else: cosine {cosine:.3f}"
    calls = 10 if size[0] == 1 else 1  # a turn lasts some ten milliseconds
    times: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(ROUNDS + 1):
        for name, worker in workers.items():
            time.sleep(PAUSE)
            times[name].append(statistics.median(worker.ask("times", size, calls + 1)[1:]))
    return {name: statistics.median(turns[1:]) for name, turns in times.items()}


def fidelity(workers: dict[str, Worker]) -> dict[str, float]:
    """Mean cosine of sentence embeddings to float32's."""
    found = {name: torch.from_numpy(w.ask("embeddings")) for name, w in workers.items()}
    return {n: float(cosine_similarity(e, found["float32"]).mean()) for n, e in found.items()}


def names_of(model: str) -> list[str]:
    """The contenders for a model here."""
    every = [name for name in CONTENDERS if name not in (*SEVEN, *IN_BUCKETS)]
    names = list({"minilm": every, "bert": MAIN}.get(model, BASIC))
    if model not in ("minilm", "bert"):
        names.append("qtk W8A8, qtk.compile")
    return names if HAS_INT8 else [*names, *SEVEN]


def run(model: str, only: Sequence[str] = ()) -> dict[str, Any]:
    names = ["float32", *only] if only else names_of(model)
    workers, missing = start(model, names, SIZES[model])
    try:
        medians = {size: measure(workers, size) for size in SIZES[model]}
        cosines = fidelity(workers) if model == "minilm" else {}
    finally:
        for worker in workers.values():
            worker.stop()
    columns = ["ms, and times float32's speed", *(f"{b}x{t}" for b, t in SIZES[model])]
    rows = []
    for name in workers:
        cells = [f"{ms[name]:.2f} ({ms['float32'] / ms[name]:.2f}x)" for ms in medians.values()]
        rows.append([name, *cells, *([f"{cosines[name]:.4f}"] if cosines else [])])
    notes = ["medians of turns, every contender in a process of its own"]
    if cosines:
        notes.append(
            "cosine of the embeddings of 128 sentences to float32's, 128 others to calibrate"
        )
    notes += [f"{name} could not run ({why})" for name, why in missing.items()]
    table = result(
        f"{(MODELS | TINY)[model][0]}, on a CPU",
        [*columns, *(["cosine"] if cosines else [])],
        rows,
        "; ".join(notes),
        versions=versions_of(*PACKAGES),
    )
    return {
        **table,
        "milliseconds": {f"{b}x{t}": ms for (b, t), ms in medians.items()},
        "cosine": cosines,
    }


def measure_and_write(model: str, only: Sequence[str] = ()) -> None:
    found = run(model, only)
    if only or model in TINY:  # a part of the table does not take its place
        print(*found["rows"], found["notes"], sep="\n")
        return
    write(f"cpu_{model}", found)
    if found["cosine"]:
        plot(found, RESULTS / f"cpu_{model}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(MODELS), metavar="|".join(MODELS))
    words = "print the rows of these beside float32, and write nothing"
    parser.add_argument(
        "--only", nargs="+", default=(), choices=list(CONTENDERS), metavar="NAME", help=words
    )
    told = parser.parse_args()
    for name in told.models:
        measure_and_write(name, told.only)
