"""Which GPU and which versions measured: what rows of one table must share."""

import shutil
import subprocess
from typing import Any

import torch

import qtk
from benchmarks.result import versions_of
from qtk_kernels._lang import triton

PACKAGES = ("gemlite", "torchao")  # peers of kernels


def this_run() -> dict[str, str]:
    """What rows must share to stand in one table."""
    driver = "unknown"
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        told = subprocess.run(query, capture_output=True, text=True, check=False).stdout
        driver = (told.splitlines() or [driver])[0]
    return {"device": torch.cuda.get_device_name(), "driver": driver,
            "torch": torch.__version__, "triton": triton.__version__}  # fmt: skip


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
