"""What a GPU is asked before anything on it is timed, and what it said, as a table.

    python -m benchmarks.speed.gpu_checks PART [--minutes 3] [--cases 60]

ceilings  copy and library products: what shares are of
check     random cases of all ops against their references, a process for each op; where one loses
          the device, another goes on behind the case, once
huge      tensors of more than 2^31 elements
ptxas     two assemblers against each other (`gpu_ptxas.py`)
sanitize  memcheck and racecheck of two cases of each op, where there is compute-sanitizer

Writes benchmarks/results/gpu_checks_<device>.json; a part replaces its own rows.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product

from benchmarks.result import RESULTS, Row, read, result, write
from benchmarks.speed import gpu_kernels
from benchmarks.speed.gpu_device import RUN, file_of, has_gpu, head, same_head, this_run

OPS = (
    "shift_scale", "activation", "layer_norm", "hadamard", "W8A8", "W4A8", "W4A4", "fp8",
    "weight_only", "heads", "attention", "sequences",
)  # fmt: skip
SANITIZED = ("memcheck", "racecheck")


def lines_of(command: list[str], seconds: float, env: dict[str, str] | None = None) -> Row:
    """What a program prints, with its exit status in the last line."""
    try:
        done = subprocess.run(
            command, env=env, timeout=max(seconds, 1), text=True, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired as late:
        printed = late.stdout or b""
        text = printed.decode(errors="replace") if isinstance(printed, bytes) else printed
        return [*text.splitlines(), "status out of time"]
    return [*done.stdout.splitlines(), f"status {done.returncode}"]


def ceilings(_: argparse.Namespace) -> list[Row]:
    return [[name, f"{rate / 1e6:.3f} {'TB/s' if name == 'bytes' else 'POPS'}"]
            for name, rate in gpu_kernels.ceilings().items()]  # fmt: skip


def check(options: argparse.Namespace) -> list[Row]:
    with ThreadPoolExecutor(min(os.cpu_count() or 1, len(OPS))) as pool:
        parts = list(pool.map(lambda op: check_op(op, options.cases, options.minutes), OPS))
    return [row for part in parts for row in part]


def check_op(op: str, cases: int, minutes: float) -> list[Row]:
    """A row for each case that fails, and one for the op. Goes on once behind a lost device."""
    rows: list[Row] = []
    start, ran = 0, 0
    for _ in range(2):
        command = [*RUN, "tests.gpu.check", str(cases), "--only", op, "--trace"]
        command += ["--minutes", str(minutes / 2), "--start", str(start)]
        lines = lines_of(command, 60 * minutes)
        seeds = [int(line.split()[-1]) for line in lines if line.startswith("case ")]
        rows += [[op, line] for line in lines if line.startswith(f"{op}, seed")]
        ran += len(seeds)
        status = lines[-1].removeprefix("status ")
        if status in ("0", "1"):
            break
        last = seeds[-1] if seeds else start
        said = lines[-2] if len(lines) > 1 else ""
        rows.append([op, f"seed {last} ended the process (status {status}): {said}"])
        start = last + 1
    return [[op, f"{ran} of {cases} random cases, {len(rows)} failed"], *rows]


def huge(options: argparse.Namespace) -> list[Row]:
    lines = lines_of([*RUN, "tests.gpu.huge"], 60 * options.minutes)
    return told("huge ", lines)


def ptxas(options: argparse.Namespace) -> list[Row]:
    command = [*RUN, "benchmarks.speed.gpu_ptxas"]
    command += ["--few", "2"] if options.few else []
    return told("ptxas", lines_of(command, 60 * options.minutes))


def sanitize(options: argparse.Namespace) -> list[Row]:
    """Without the allocator's cache, or what lies behind a tensor is memory like any other."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return [["sanitize", "not run: there is no compute-sanitizer"]]
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def one(job: tuple[str, str]) -> Row:
        kind, op = job
        command = [tool, "--tool", kind, "--report-api-errors", "no", "--error-exitcode", "9"]
        command += [*RUN, "tests.gpu.check", "2", "--only", op]
        lines = lines_of(command, 60 * options.minutes, env)
        found = [line for line in lines if re.search("ERROR SUMMARY|RACECHECK SUMMARY", line)]
        return [f"{kind} {op}", f"{lines[-1]}; {found[-1].strip('= ') if found else 'no summary'}"]

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(one, product(SANITIZED, OPS)))


def told(start: str, lines: Row) -> list[Row]:
    """Rows of lines that begin so, and the end of what was printed where it did not end well."""
    rows = [line.removeprefix(start).strip(" ").split(": ", 1) for line in lines
            if line.startswith(start)]  # fmt: skip
    found = [row if len(row) == 2 else [start.strip(), row[0]] for row in rows]
    if lines[-1] not in ("status 0", "status 1") or not found:
        found.append([start.strip(), " ".join(lines[-3:])[:300]])
    return found


PARTS: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    "ceilings": ceilings, "check": check, "huge": huge, "ptxas": ptxas, "sanitize": sanitize,
}  # fmt: skip
WRONG = re.compile(r"ended|Error|differ|status [^0]|out of time")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--cases", type=int, default=60)
    parser.add_argument("--few", type=int, help="this many cases")
    options = parser.parse_args(arguments)
    options.cases = options.few or options.cases
    if not has_gpu():
        print("No GPU: nothing is checked.")
        return 0
    run = this_run()
    rows = [[options.part, *row] for row in PARTS[options.part](options)]
    for row in rows:
        print(*row, flush=True)
    file, top = file_of("gpu_checks", run), head(run)
    old = read(file, RESULTS)
    kept = old["rows"] if old and same_head(old, top) else []
    kept = [row for row in kept if row[0] != options.part]
    notes = "what a GPU was asked before anything on it was timed"
    table = result("Checks on a GPU", ["part", "what", "found"], [*kept, *rows], notes, **top)
    write(file, table, RESULTS)
    return int(any(WRONG.search(row[2]) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
