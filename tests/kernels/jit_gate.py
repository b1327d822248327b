"""What a launch would compile, compiled without a GPU: the first thing to break on one.

    python -m tests.kernels.jit_gate                  everything, a process for each core
    python -m tests.kernels.jit_gate --arch 90 --only attention
    python -m tests.kernels.jit_gate --few 60         some of each op, for all cards, in one process

Fails where a launch does not compile, wants more shared memory than the card has, spills registers
or waits after every wgmma, but for what `Case` tolerates. Each whole number of a launch is compiled
as 1 once, too.
"""

import argparse
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product

from tests.kernels import jit  # isort: skip (a card has to be imagined before kernels are imported)
import torch

from tests.kernels.jit_cases import OPS, Case
from tests.kernels.jit_reported import reported

SEEDS = 8  # of each random check, others for each card
OTHERS = ("reported", "checked")  # beside OPS
# bytes of stack beside those of a `Case`: mma.sync holds what it multiplies in registers, of
# attention with 256 keys all of it at once, which costs at most 0.6 instructions a score where a
# walk would compute scores twice; sm_100 lacks a few words
SPILLS: dict[int, dict[str, int]] = {
    80: {"quantized_attention_kernel": 160, "_weight_only_linear_kernel": 16},
    86: {"quantized_attention_kernel": 160, "_weight_only_linear_kernel": 16},
    90: {"quantized_attention_kernel": 96, "_int4_linear_kernel": 8, "gemv_floats_kernel": 8},
    100: {
        **{f"_{op}_linear_kernel": 40 for op in ("int8", "int4", "fp8", "weight_only")},
        "quantized_attention_kernel": 136,
    },
}
WHOLE = 128  # channels of a head beyond which registers do not hold it
FP8_FROM = 89  # what multiplies e4m3
HOPPER = 90


class Compiled(Exception):
    """Ends a check where a GPU would compare."""


def checked(arch: int) -> Iterator[Case]:
    """The random cases of the GPU checks, with a GPU's sizes."""
    torch.cuda.is_available = lambda: True  # what they draw their sizes and operands by
    torch.cuda.get_device_capability = lambda device=None: divmod(arch, 10)
    from tests.gpu import attention, cases, check, linears, quantizers

    cases.LARGE = ()  # the same launches, in gigabytes

    def both(op, *args, **options):
        op(*args, **options, backend="triton")
        raise Compiled

    for module in (attention, linears, quantizers):
        module.both = both

    def run(name: str, seed: int) -> None:
        try:
            check.check(name, seed, "cpu")
        except Compiled:
            return

    first = list(jit.SHARED).index(arch) * SEEDS
    for seed, name in product(range(first, first + SEEDS), check.runnable()):
        stack = 1024 if name == "weight_only" else 384  # float32 rows that begin anywhere
        yield Case(
            f"check {name} {seed}", lambda n=name, s=seed: run(n, s), stack=stack, waits=True
        )


def cases(op: str, arch: int) -> list[Case]:
    if op == "reported":
        return list(reported())
    if op == "checked":
        return list(checked(arch))
    if op == "bulk" and arch != HOPPER:
        return []
    return [] if op.startswith("fp8") and arch < FP8_FROM else list(OPS[op]())


def failures(case: Case, arch: int, ones: str) -> list[str]:
    """What is wrong with what one call compiles."""
    try:
        with jit.compiling(arch, ones) as found:
            case.run()
    except Exception as error:
        said = [line.strip() for line in str(error).splitlines() if re.search("[a-z]", line)]
        return [f"{type(error).__name__}: {'; '.join(said[-2:])}"]
    wrong = []
    if case.kernel and case.kernel not in {b.kernel for b in found}:
        wrong.append(f"{case.kernel} is not what serves")
    for b in found:
        wrong += [f"{b.kernel}: {b.shared} bytes of shared memory"] * (b.shared > jit.SHARED[arch])
        stack = case.stack + SPILLS.get(arch, {}).get(b.kernel, 0)
        wrong += [f"{b.kernel}: {b.stack} bytes of stack"] * (b.stack > stack and b.head <= WHOLE)
        wrong += [f"{b.kernel}: waits after each wgmma"] * (b.serialized and not case.waits)
    return wrong


def gate(op: str, arch: int, few: int | None) -> int:
    """Compiles the cases of an op, or a few of them, and prints what fails."""
    every = cases(op, arch)
    if few is not None:
        rng = random.Random(f"{op} {arch}")
        first = [case for case in every if case.first]
        rest = [case for case in every if not case.first]
        some = rng.sample(first, min(len(first), few // 2))
        every = [*some, *rng.sample(rest, min(len(rest), few - len(some)))]
    failed, numbered = 0, set()
    for case in every:
        kind = case.name.split()[0]
        new = kind not in numbered and op != "reported"  # those say which number is 1
        ones = "all" if few is not None else "each"
        numbered.add(kind)
        wrong = failures(case, arch, ones if new else "none")
        failed += bool(wrong)
        for text in wrong:
            print(f"sm_{arch} {case.name}: {text}", flush=True)
    print(f"sm_{arch} {op}: {failed} of {len(every)} fail, triton {jit.triton.__version__}",
          flush=True)  # fmt: skip
    return failed


def alone(job: tuple[str, int]) -> int:
    """A part in a process of its own: a compiler that crashes takes no other part with it."""
    op, arch = job
    command = [sys.executable, "-m", "tests.kernels.jit_gate", "--only", op, "--arch", str(arch)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stdout, end="", flush=True)
    if done.returncode not in (0, 1):
        print(f"sm_{arch} {op}: crashed\n{done.stderr[-2000:]}", flush=True)
    return done.returncode


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", type=int, choices=list(jit.SHARED))
    parser.add_argument("--only", choices=[*OPS, *OTHERS])
    parser.add_argument("--few", type=int, help="cases of an op")
    options = parser.parse_args(arguments)
    ops = [options.only] if options.only else [*OPS, *OTHERS]
    jobs = list(product(ops, [options.arch] if options.arch else list(jit.SHARED)))
    if options.few is not None or len(jobs) == 1:
        return int(sum(gate(op, arch, options.few) for op, arch in jobs) > 0)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return int(any(list(pool.map(alone, jobs))))


if __name__ == "__main__":
    sys.exit(main())
