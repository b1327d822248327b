"""Products whose tiles are copied in bulk, beside the present ones, on a Hopper.

    python -m benchmarks.speed.gpu_bulk [--minutes 8] [--few N]

writes benchmarks/results/gpu_bulk_<device>.json after each shape: microseconds of `_tma.py`, of the
product with tiles and pointers, and whether both give the same numbers.
"""

import argparse
import sys
import time
from itertools import product

import torch

from benchmarks.result import RESULTS, Row, result, write
from benchmarks.speed.gpu_device import RESTART, file_of, has_gpu, head, this_run
from qtk_kernels import _tma, tune
from qtk_kernels._launch import use_tile

DEVICE = "cuda"
COLUMNS = ("kernel", "M x N x K", "bulk copies, us", "pointers, us", "same numbers")
SHAPES = ((4096, 4096, 4096), (8192, 4096, 4096), (8192, 3072, 768), (8192, 768, 3072),
          (2048, 8192, 2048), (8192, 8192, 8192), (1024, 16384, 4096))  # fmt: skip


def measured(kernel: str, M: int, N: int, K: int) -> Row:
    """One row; a failure is what it said."""
    name, device = f"{M} x {N} x {K}", torch.device(DEVICE)
    if _tma.rule(M, N, kernel == "int8_linear") is None:
        return [kernel, name, "-", "-", "too few tiles"]
    try:
        calls = tune.linear_calls(kernel, M, N, K, device)
        bulk, got = tune.microseconds(calls), calls[0]()
        with use_tile(tune._present(kernel, M, N, K, device)):
            pointers, want = tune.microseconds(calls), calls[0]()
        same = "yes" if tune._close(got, want) else "no"
    except Exception as error:
        return [kernel, name, "-", "-", tune.said(error)]
    return [kernel, name, f"{bulk:.1f}", f"{pointers:.1f}", same]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--few", type=int, help="this many shapes of each kernel")
    options = parser.parse_args(arguments)
    if not has_gpu() or torch.cuda.get_device_capability() != _tma.HOPPER:
        print("no Hopper: nothing is measured")
        return 0
    run, rows, end = this_run(), [], time.monotonic() + 60 * options.minutes
    for shape, kernel in product(SHAPES[: options.few], ("int8_linear", "fp8_linear")):
        if time.monotonic() > end:
            print("out of time")
            break
        rows.append(measured(kernel, *shape))
        print(*rows[-1], flush=True)
        notes = "medians on the device of CUDA graphs that go around in more than a cache holds"
        found = head(run)
        table = result(
            "Tiles copied in bulk, and by pointers", COLUMNS, rows, notes,
            hardware=found["hardware"], versions=found["versions"],
        )  # fmt: skip
        write(file_of("gpu_bulk", run), table, RESULTS)
        if not tune.answers(torch.device(DEVICE)):
            return RESTART
    return 0


if __name__ == "__main__":
    sys.exit(main())
