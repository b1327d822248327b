"""Speed of whole models on a CPU: float against quantized, qtk against its peers, interleaved.

    python -m benchmarks.speed.cpu_models [MODEL ...]

Every contender has a process of its own (`cpu_contenders.py`), and they take turns, so that a noisy
machine is noisy for all of them. Medians are reported, and the ratio to float32 in the same run.
Outputs are checked on the way: a model that is fast and wrong does not pass. What cannot run is
named with its reason; the peers are `pip install onnx onnxruntime torchao optimum-quanto`. Writes
benchmarks/results/cpu_<model>.json, and a plot of speed against fidelity.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cosine_similarity

from benchmarks.result import RESULTS, result, versions_of, write
from benchmarks.speed.cpu_contenders import BASIC, CONTENDERS, MAIN, MODELS, TOKENS, Size, Worker

ROUNDS = 7
PAUSE = 0.05  # seconds before each turn, for the threads of the one before to fall asleep
SIZES: dict[str, tuple[Size, ...]] = {
    "minilm": ((16, 128), (1, 128), (1, 16)),
    "bert": ((16, 128), (1, 128), (1, 16)),
    "opt": ((16, 128), (1, 128), (1, 16)),
    "vit": ((16, TOKENS), (1, TOKENS)),
}
PACKAGES = ("qtk", "torch", "transformers", "torchao", "onnxruntime", "optimum-quanto")


def start(model: str, names: Sequence[str]) -> tuple[dict[str, Worker], dict[str, str]]:
    """A worker for each contender that runs here, compiled for every size; why others do not."""
    workers: dict[str, Worker] = {}
    missing: dict[str, str] = {}

    def one(name: str) -> None:
        worker = Worker(model, name)
        try:
            if worker.error is not None:
                raise RuntimeError(worker.error)
            for size in SIZES[model]:
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


def run(model: str) -> dict[str, Any]:
    names = {"minilm": tuple(CONTENDERS), "bert": MAIN}.get(model, BASIC)
    workers, missing = start(model, names)
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
        f"{MODELS[model][0]}, on a CPU",
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


def plot(found: dict[str, Any], path: Path) -> None:
    """Speed against fidelity, a point for each contender."""
    from matplotlib import pyplot as plt

    ms = found["milliseconds"]["16x128"]
    figure, axes = plt.subplots(figsize=(7.5, 4.5))
    for name, cosine in found["cosine"].items():
        speed, error = ms["float32"] / ms[name], 1 - cosine
        if error < 1e-6:
            continue  # float32 itself
        ours = name.startswith("qtk")
        axes.scatter(speed, error, color="#c2410c" if ours else "#64748b", zorder=3)
        axes.annotate(name, (speed, error), xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes.set(
        yscale="log", xlabel="speed over float32, 16x128", ylabel="1 - cosine to float32",
        title=found["title"],
    )  # fmt: skip
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.grid(alpha=0.3)
    figure.text(0.01, 0.01, found["hardware"], fontsize=7, color="#64748b")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def measure_and_write(model: str) -> None:
    found = run(model)
    write(f"cpu_{model}", found)
    if found["cosine"]:
        plot(found, RESULTS / f"cpu_{model}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(MODELS), metavar="|".join(MODELS))
    for name in parser.parse_args().models:
        measure_and_write(name)
