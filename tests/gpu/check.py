"""Every kernel against its reference, at random odd shapes, dtypes and layouts.

    python -m tests.gpu.check [cases] [--only OP] [--minutes 9] [--start SEED] [--trace]

`cases` of each op; on a CPU they are interpreted. Outputs are poisoned before a kernel runs, so
that what it does not write is seen; on a GPU every case runs twice, and must give the same bits.
The bounds are those of the tests: equal codes but next to a rounding boundary, and K float32
roundings.
"""

import argparse
import os
import random
import sys
import time
from collections.abc import Callable
from functools import partial

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.gpu import attention, linears, quantizers
from tests.gpu.cases import multiplies_fp8
from tests.gpu.compare import answers

LOST = 3  # exit status where the device is lost to this process: another may go on behind the case
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHECKS: dict[str, Callable[[random.Random, str], None]] = {
    **{op: partial(quantizers.quantizer, op) for op in quantizers.QUANTIZERS},
    **{op: partial(linears.integer_linear, op) for op in ("W8A8", "W4A8", "W4A4")},
    "fp8": linears.fp8,
    "weight_only": linears.weight_only,
    "heads": quantizers.heads,
    "attention": attention.attention,
    "sequences": attention.sequences,
}


def check(name: str, seed: int, device: str) -> None:
    """One random case of an op."""
    torch.manual_seed(seed)
    CHECKS[name](random.Random(seed), device)


def runnable() -> list[str]:
    """The ops that the card at hand has instructions for."""
    return [name for name in CHECKS if name != "fp8" or multiplies_fp8()]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("cases", type=int, nargs="?", default=100)
    parser.add_argument("--only", choices=list(CHECKS))
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    parser.add_argument("--trace", action="store_true", help="names each case before it runs")
    options = parser.parse_args(arguments)
    end, failed = time.monotonic() + 60 * options.minutes, 0
    done = dict.fromkeys([options.only] if options.only else runnable(), 0)
    for seed in range(
        options.start, options.cases
    ):  # all ops keep pace: time cuts none of them off
        for name in done:
            if time.monotonic() > end:
                break
            if options.trace:
                print(f"case {name} {seed}", flush=True)
            done[name] += 1
            try:
                check(name, seed, DEVICE)
            except Exception as error:  # a kernel that does not compile is a finding, too
                failed += 1
                print(f"{name}, seed {seed}: {type(error).__name__}: {error}", flush=True)
                if not answers():
                    print(f"{name}: the device is lost", flush=True)
                    return LOST
    for name, cases in done.items():
        short = cases < options.cases - options.start
        print(f"{name}: {cases} random cases" + (", out of time" * short))
    print(f"{failed} of {sum(done.values())} disagree with the reference on {DEVICE}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
