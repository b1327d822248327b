"""What it takes to quantize MiniLM: seconds and peak memory, by preset.

    python -m benchmarks.speed.quantize [--only ROW ...]

Every case runs in a process of its own, so that the peak is its own. Writes
benchmarks/results/quantize.json; --only measures the named rows and keeps the others of the file.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

import qtk
from benchmarks import data
from benchmarks.result import Row, read, result, write

CASES: dict[str, dict[str, Any]] = {
    "W8A8 fast": {"w": 8, "a": 8, "preset": "fast"},
    "W8A8 balanced": {"w": 8, "a": 8},
    "W8A8 best": {"w": 8, "a": 8, "preset": "best"},
    "W4A4 fast": {"w": 4, "a": 4, "preset": "fast"},
    "W4A4 balanced": {"w": 4, "a": 4},
    "W4A4 best, 2,048 sentences": {"w": 4, "a": 4, "preset": "best", "sentences": 2048},
}


def once(options: dict[str, Any]) -> dict[str, float]:
    """Seconds and megabytes of one quantization in this process."""
    model, tokenizer = data.minilm()
    calib = data.stsb_calibration(0, options.pop("sentences", 256))
    before = peak()
    start, cpu = time.perf_counter(), time.process_time()
    qtk.quantize(model, calib=calib, tokenizer=tokenizer, progress=False, **options)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {"seconds": seconds, "cpu": cpu, "peak": peak(), "before": before}


def peak() -> float:
    """Largest resident size of this process so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measured(name: str) -> Row:
    """A row of the table."""
    command = [sys.executable, "-m", "benchmarks.speed.quantize", "--once", json.dumps(CASES[name])]
    ran = subprocess.run(command, capture_output=True, check=True, text=True)
    out = json.loads(ran.stdout.splitlines()[-1])
    figures = (out["seconds"], out["cpu"])
    sizes = (out["peak"], out["peak"] - out["before"])
    return [name, *(f"{x:.1f}" for x in figures), *(f"{x:.0f}" for x in sizes)]


def table(rows: list[Row], old: dict[str, Any]) -> dict[str, Any]:
    return result(
        "Quantizing MiniLM, 256 sentences unless a row says otherwise",
        ["what", "seconds", "CPU seconds", "peak MB", "of it by quantizing"],
        rows,
        "wall clock and the time of all threads, tokenization included; one process each",
        kept=old,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--once", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once is not None:
        print(json.dumps(once(options.once)))
        return
    old = read("quantize") if options.only != list(CASES) else {}
    kept = {row[0]: row for row in old.get("rows", ())}
    for name in options.only:
        kept[name] = measured(name)
        write("quantize", table([kept[name] for name in CASES if name in kept], old))


if __name__ == "__main__":
    main()
