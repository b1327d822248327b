"""What it takes to quantize MiniLM with 256 sentences: seconds and peak memory, by preset.

    python -m benchmarks.bench_quantize

Every case runs in a process of its own, so that the peak is its own. Writes
benchmarks/results/quantize.json.
"""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

import qtk
from benchmarks import data
from benchmarks.bench_cpu_models import cpu_name

RESULTS = Path(__file__).parent / "results" / "quantize.json"
CASES: list[dict[str, Any]] = [
    {"w": 8, "a": 8, "preset": "fast"},
    {"w": 8, "a": 8},
    {"w": 8, "a": 8, "preset": "best"},
    {"w": 4, "a": 4, "preset": "fast"},
    {"w": 4, "a": 4},
]


def once(options: dict[str, Any]) -> dict[str, float]:
    """Seconds and megabytes of one quantization in this process."""
    from transformers import AutoModel, AutoTokenizer

    path = data.minilm_path()
    model, tokenizer = AutoModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    before = peak()
    start = time.perf_counter()
    calib = data.stsb_calibration(0)
    qtk.quantize(model, calib=calib, tokenizer=tokenizer, progress=False, **options)
    return {"seconds": time.perf_counter() - start, "peak": peak(), "before": before}


def peak() -> float:
    """Largest resident size of this process so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run() -> dict[str, Any]:
    rows = []
    for options in CASES:
        command = [sys.executable, "-m", "benchmarks.bench_quantize", json.dumps(options)]
        out = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        name = f"W{options['w']}A{options['a']} {options.get('preset', 'balanced')}"
        more = out["peak"] - out["before"]
        rows.append([name, f"{out['seconds']:.1f}", f"{out['peak']:.0f}", f"{more:.0f}"])
    return {
        "title": "Quantizing MiniLM with 256 sentences",
        "hardware": cpu_name(),
        "versions": {"qtk": qtk.__version__, "torch": torch.__version__},
        "columns": ["what", "seconds", "peak MB", "of it by quantizing"],
        "rows": rows,
        "notes": "wall clock, tokenization included; one process each",
    }


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(once(json.loads(sys.argv[1]))))
    else:
        RESULTS.write_text(json.dumps(run(), indent=1) + "\n", encoding="utf-8")
