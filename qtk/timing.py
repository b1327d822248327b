"""How long calls take, timed beside each other so that a noisy machine is noisy for all."""

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

ENOUGH = 5  # rounds after which a race that takes too long may end


@torch.inference_mode()
def race(
    calls: Mapping[str, Callable[[], Any]], rounds: int = 15, warmup: int = 3, limit: float = 20.0
) -> dict[str, float]:
    """Median seconds of each call; in each round every one is made once.

    A call that uses a GPU is over when the GPU is done.

    Args:
        calls: by name.
        rounds: at most.
        warmup: rounds before them that are not counted.
        limit: seconds after which no new round begins, if there have been `ENOUGH`.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(warmup):
        for call in calls.values():
            _once(call)
    start = time.perf_counter()
    for i in range(rounds):
        if i >= ENOUGH and time.perf_counter() - start > limit:
            break
        for name, call in calls.items():
            seconds[name].append(_once(call))
    return {name: statistics.median(times) for name, times in seconds.items()}


def hardware() -> dict[str, Any]:
    """What the figures depend on: processor, threads, versions."""
    return {
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _once(call: Callable[[], Any]) -> float:
    _wait()
    start = time.perf_counter()
    call()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _cpu() -> str:
    """The processor's name, with the integer units that matter here."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    name = fields.get("model name") or platform.processor() or platform.machine()
    flags = fields.get("flags", "").split()
    units = {"amx_int8": "AMX int8", "avx512_vnni": "AVX-512 VNNI", "avx_vnni": "AVX VNNI"}
    found = [unit for flag, unit in units.items() if flag in flags]
    return f"{name} ({', '.join(found)})" if found else name
