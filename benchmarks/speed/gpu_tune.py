"""Measures tiles where a peer wins, then at all shapes of the models.

    python -m benchmarks.speed.gpu_tune [--minutes 8] [--few N]

"Where a peer wins" is what gpu_slower_<device>.json says. Writes the table of this card beside the
kernels, which then follow it; another run goes on where this one ran out of time.
"""

import argparse
import sys

from benchmarks.result import RESULTS, read
from benchmarks.speed.gpu_device import RESTART, file_of, has_gpu, this_run
from qtk_kernels.tune import KERNELS, DeviceLostError, Shape, all_shapes, tune


def lost_shapes() -> list[Shape]:
    """Kernels and shapes where a peer is faster, the worst first."""
    rows = read(file_of("gpu_slower", this_run()), RESULTS).get("rows", [])
    found = [(row[0], *map(int, row[1].split("x"))) for row in rows if row[0] in KERNELS]
    return list(dict.fromkeys((name, M, N, K) for name, M, N, K in found))  # type: ignore[misc]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--few", type=int, help="this many shapes")
    options = parser.parse_args(arguments)
    if not has_gpu():
        print("No GPU: nothing is measured.")
        return 0
    shapes = list(dict.fromkeys([*lost_shapes(), *all_shapes()]))[: options.few]
    try:
        print(tune(minutes=options.minutes, shapes=shapes))
    except DeviceLostError as error:
        print(f"the device is lost: {error}", flush=True)
        return RESTART
    return 0


if __name__ == "__main__":
    sys.exit(main())
