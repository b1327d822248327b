"""Compiles what the checks and benches will launch, on all cores, into Triton's cache.

    python -m benchmarks.speed.gpu_warm [--minutes 2] [--arch 90] [--cases 60] [--few N]

Launches take a second of one core each, which a GPU would wait for. Here they are compiled by the
same JIT without one (`gpu_dry.py`), so that this also runs at home, for a card that is elsewhere:
TRITON_CACHE_DIR then travels. Triton's version, its assembler and Python's must be the same.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, product, zip_longest
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.gpu_checks import OPS
from benchmarks.speed.gpu_device import has_gpu
from benchmarks.speed.gpu_kernels import first_cases
from qtk_kernels.tune import KERNELS, ROWS, candidates, said

Job = tuple[Any, ...]  # a function below by its name, and what it is called with
LENGTHS = (512, 128, 4096, 197, 1024)


def jobs(cases: int) -> list[Job]:
    """What a launch of each call to the GPU will want, the kinds in turns."""
    checks = [("check", op, seed) for seed, op in product(range(cases), OPS)]
    bench = [("bench", *case) for case in first_cases()]
    attention = [("attention", T, causal) for causal, T in product((False, True), LENGTHS)]
    tiles = [("tile", kernel, M, tile) for kernel, M in product(KERNELS, ROWS)
             for tile in candidates(kernel, M)]  # fmt: skip
    turns = chain.from_iterable(zip_longest(checks, bench, attention))
    return [*(job for job in turns if job is not None), *tiles]


def check(op: str, seed: int) -> None:
    from tests.gpu import check

    if op in check.runnable():
        check.check(op, seed, "cpu")


def bench(name: str, shape: tuple[int, ...]) -> None:
    from benchmarks.speed import gpu_kernels
    from tests.gpu.cases import multiplies_fp8

    if "fp8" not in name or multiplies_fp8():
        gpu_kernels.calls_of(name, shape)[0]()


def attention(T: int, causal: bool) -> None:
    from benchmarks.speed import gpu_attention
    from tests.gpu.cases import multiplies_fp8

    shape = (max(gpu_attention.TOKENS // T, 1), T, 3, gpu_attention.HEADS, gpu_attention.HEAD)
    buffer = torch.empty(shape, device="meta", dtype=torch.bfloat16)
    for name, make in gpu_attention.CONTENDERS.items():
        if name.startswith("qtk") and ("fp8" not in name or multiplies_fp8()):
            make(buffer, causal)()


def tile(kernel: str, M: int, tile: dict[str, Any]) -> None:
    from qtk_kernels.tune import linear_calls, use_tile

    with use_tile(tile):
        linear_calls(kernel, M, 4096, 4096, torch.device("meta"))[0]()


KINDS: dict[str, Callable[..., None]] = {
    "check": check,
    "bench": bench,
    "attention": attention,
    "tile": tile,
}
_compiling: Any = None


def start(arch: int) -> None:
    """Of a process of the pool."""
    global _compiling
    from benchmarks.speed import gpu_dry  # imagines a card, so not where there may be one

    torch.set_num_threads(1)
    gpu_dry.imagine(Path(tempfile.gettempdir()), arch)
    from benchmarks.speed import gpu_kernels
    from tests.gpu import check

    gpu_kernels.DEVICE = "meta"
    gpu_dry.checks_only(check)
    gpu_dry.jit.triton.knobs.compilation.always_compile = False
    _compiling = gpu_dry.jit.compiling(arch)
    _compiling.__enter__()


def compile_one(job: Job) -> str:
    """What went wrong, or nothing."""
    kind, *arguments = job
    try:
        KINDS[kind](*arguments)
    except Exception as error:  # a tile that does not fit; a case that a check will report
        return said(error)
    return ""


def compiled(todo: list[Job], arch: int, workers: int, end: float) -> Iterator[tuple[Job, str]]:
    """Jobs in their order, with what went wrong, while there is time."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, initializer=start, initargs=(arch,)) as pool:
        waiting = [(job, pool.submit(compile_one, job)) for job in todo]
        try:
            for job, future in waiting:
                yield job, future.result(timeout=max(end - time.monotonic(), 0.01))
        except TimeoutError:
            print("out of time: the rest is compiled when it is launched", flush=True)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--arch", type=int, help="90 for sm_90; the card at hand by default")
    parser.add_argument("--cases", type=int, default=60, help="random cases of each check")
    parser.add_argument("--few", type=int, help="this many jobs, spread over all")
    options = parser.parse_args(arguments)
    begin, arch = time.monotonic(), options.arch or 90
    if options.arch is None and has_gpu():
        major, minor = torch.cuda.get_device_capability()
        arch = 10 * major + minor
    todo = jobs(options.cases)
    if options.few:
        todo = todo[:: max(len(todo) // options.few, 1)][: options.few]
    workers = min(os.cpu_count() or 1, len(todo))
    done = failed = 0
    for job, wrong in compiled(todo, arch, workers, begin + 60 * options.minutes):
        done += 1
        failed += bool(wrong) and job[0] != "tile"
        if wrong and job[0] != "tile":
            print(*job, wrong, flush=True)
    print(f"sm_{arch}: {done} of {len(todo)} launches compiled, {failed} failed, "
          f"{time.monotonic() - begin:.0f} s on {workers} cores", flush=True)  # fmt: skip
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
