"""OPT-1.3b's shape with random weights, from a folder to a folder: seconds and peak memory.

    python -m benchmarks.speed.low_memory [--folder FOLDER]

Every case runs in a process of its own, so that the peak is its own. Writes
benchmarks/results/low_memory.json. The folder takes 2.7 GB for the model, which is made once.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import qtk
from benchmarks.result import Row, result, write
from benchmarks.speed.quantize import peak

SHAPE: dict[str, Any] = {
    "hidden_size": 2048, "word_embed_proj_dim": 2048, "ffn_dim": 8192, "num_hidden_layers": 24,
    "num_attention_heads": 32, "vocab_size": 50272, "max_position_embeddings": 2048,
}  # fmt: skip
SENTENCES, TOKENS = 8, 128
CASES: dict[str, dict[str, Any]] = {
    "W4A16 g128, nearest": {"w": 4, "a": 16, "group_size": 128, "preset": "fast"},
}


def make(folder: Path) -> None:
    """The float16 model, in shards of about a block."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    OPTForCausalLM(OPTConfig(**SHAPE)).save_pretrained(folder, max_shard_size="200MB")


def once(folder: Path, out: Path, options: dict[str, Any]) -> dict[str, float]:
    """Seconds and megabytes of one run in this process."""
    drawn = torch.Generator().manual_seed(0)
    ids = torch.randint(4, SHAPE["vocab_size"], (SENTENCES, TOKENS), generator=drawn)
    calib = [{"input_ids": row[None]} for row in ids]
    before, start = peak(), time.perf_counter()
    qtk.quantize_files(folder, out, calib=calib, dtype=torch.float32, progress=False, **options)
    return {"seconds": time.perf_counter() - start, "peak": peak(), "before": before}


def measured(name: str, folder: Path) -> Row:
    """A row of the table."""
    if not (folder / "config.json").exists():
        subprocess.run(_command("--make", str(folder)), check=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as out:
        words = (
            "--once",
            json.dumps(CASES[name]),
            "--folder",
            str(folder),
            "--out",
            f"{out}/model",
        )
        ran = subprocess.run(_command(*words), check=True, capture_output=True, text=True)
        sizes = [sum(f.stat().st_size for f in p.glob("*.safetensors")) / 2**20
                 for p in (folder, Path(out) / "model")]  # fmt: skip
    found = json.loads(ran.stdout.splitlines()[-1])
    figures = (found["seconds"], found["peak"], found["before"], *sizes)
    return [name, *(f"{x:.0f}" for x in figures)]


def _command(*words: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.speed.low_memory", *words]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("opt-1.3b-shape"))
    parser.add_argument("--make", type=Path)
    parser.add_argument("--once")
    parser.add_argument("--out", type=Path)
    told = parser.parse_args()
    if told.make:
        make(told.make)
    elif told.once:
        print(json.dumps(once(told.folder, told.out, json.loads(told.once))))
    else:
        columns = ["what", "seconds", "peak MB", "of it before", "float16 MB read", "MB written"]
        rows = [measured(name, told.folder) for name in CASES]
        notes = (
            f"Random weights of OPT-1.3b's shape, computed in float32, {SENTENCES} sequences of "
            f"{TOKENS} tokens. Peak is the largest resident size of the process, files that are "
            "mapped into memory included."
        )
        title = "OPT-1.3b's shape to four bits, from a folder to a folder, block by block"
        write("low_memory", result(title, columns, rows, notes))


if __name__ == "__main__":
    main()
