"""Which GPU and which versions measured: what rows of one table must share."""

import re
import shutil
import subprocess
import sys
from typing import Any

import torch

import qtk
from benchmarks.result import versions_of
from qtk_kernels._lang import triton

PACKAGES = ("gemlite", "torchao")  # peers of kernels
RUN = [sys.executable, "-m"]  # how a program is started from another; a dry run puts its own
RESTART = 3  # exit status of a step whose device is lost to its process: a new one may go on


def has_gpu() -> bool:
    return torch.cuda.is_available()


def file_of(name: str, run: dict[str, str]) -> str:
    """Two devices never share a file: "gpu_models" -> "gpu_models_nvidia_h100_80gb_hbm3"."""
    device = re.sub(r"[^a-z0-9]+", "_", run["device"].lower()).strip("_")
    return f"{name}_{device}"


def this_run() -> dict[str, str]:
    """What rows must share to stand in one table."""
    driver = "unknown"
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        told = subprocess.run(query, capture_output=True, text=True, check=False).stdout
        driver = (told.splitlines() or [driver])[0]
    return {"device": torch.cuda.get_device_name(), "driver": driver,
            "torch": torch.__version__, "triton": triton.__version__}  # fmt: skip


def same_head(table: dict[str, Any], top: dict[str, Any]) -> bool:
    """Whether an earlier table's rows may stand beside new ones."""
    return all(table.get(key) == value for key, value in top.items())


def head(run: dict[str, str], limits: dict[str, float] | None = None) -> dict[str, Any]:
    """Hardware, with the measured ceilings, and versions: the end of a result."""
    found = ", ".join(f"{name} {rate / 1e6:.2f}" for name, rate in (limits or {}).items())
    device = f"{run['device']}, driver {run['driver']}"
    return {
        "hardware": f"{device}; measured TB/s and POPS: {found}" if found else device,
        "versions": {
            "qtk": qtk.__version__, "torch": run["torch"], "triton": run["triton"],
            "cuda": str(torch.version.cuda), **versions_of(*PACKAGES),
        },
    }  # fmt: skip
