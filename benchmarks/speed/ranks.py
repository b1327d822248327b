"""Quantizing MiniLM on two processes of one thread against one process of two.

    python -m benchmarks.speed.ranks [--turns N]

Each turn is a fresh start of both, one after the other. Writes benchmarks/results/ranks.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import torch

import qtk
from benchmarks import data
from benchmarks.result import Row, result, write
from qtk import ranks

CASES: dict[str, dict[str, Any]] = {
    "W8A8 fast": {"w": 8, "a": 8, "preset": "fast"},
    "W4A4 fast": {"w": 4, "a": 4, "preset": "fast"},
    "W4A4 balanced": {"w": 4, "a": 4},
}
ONE = [sys.executable, "-m", "benchmarks.speed.ranks", "--once"]
TWO = [
    sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
    "-m", "benchmarks.speed.ranks", "--once",
]  # fmt: skip


def once(options: dict[str, Any]) -> float:
    """Seconds of one quantization in this process, or in the group that it belongs to."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model, tokenizer = data.minilm()
    calib = data.stsb_calibration(0, 256)
    with ranks.group("cpu"):
        start = time.perf_counter()
        qtk.quantize(model, calib=calib, tokenizer=tokenizer, progress=False, **options)
        return time.perf_counter() - start


def seconds(command: list[str], threads: int, options: dict[str, Any]) -> float:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "GLOO_SOCKET_IFNAME": "lo"}
    ran = subprocess.run(
        [*command, json.dumps(options)],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    return max(float(line) for line in ran.stdout.split() if line[0].isdigit())


def measured(name: str, turns: int) -> Row:
    """A row of the table."""
    one, two = [], []
    for turn in range(turns):
        one.append(seconds(ONE, 2, CASES[name]))
        two.append(seconds(TWO, 1, CASES[name]))
        print(name, turn, one[-1], two[-1], flush=True)
    a, b = statistics.median(one), statistics.median(two)
    return [name, f"{a:.1f}", f"{b:.1f}", f"{a / b:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--once", type=json.loads, help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.once is not None:
        print(once(told.once))
        return
    columns = ["what", "1 process, 2 threads: s", "2 processes, 1 thread: s", "times as fast"]
    notes = (
        f"256 sentences of STS-B; medians of {told.turns} turns, loading the model and starting "
        "the processes left out"
    )
    rows: list[Row] = []
    for name in CASES:
        rows.append(measured(name, told.turns))
        write("ranks", result("Quantizing MiniLM on two processes", columns, rows, notes))


if __name__ == "__main__":
    main()
