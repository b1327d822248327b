"""Calls and steps of a GPU run: what to start, how long it may take, and what is brought home.

    benchmarks/run_gpu.sh CALL|STEP ... [--minutes 9] [--out DIR] [--dry] [--few N]
    benchmarks/run_gpu.sh take DIR      at home: puts what came home where it belongs, and shows it

call1  is it right: ceilings, warm, check, huge, ptxas, sanitize
call2  is it fast: bench, attention
call3  bulk copies against pointers on a Hopper, tune where a peer wins, whole models
later  the rest, for further calls: tests, packages, all shapes, all models

All steps of one command share its minutes; a step that is killed, fails or loses the device does
not end the others. A lost device restarts a step once, behind the case that lost it. Whatever a
step has written is copied to DIR ($OUT, else benchmarks/results) while it runs, at its end, and
when the run is interrupted: flat, at most 7 files and a log. A machine that forgets everything
needs them back before the next command: `take` them at home, and the tree that is sent again holds
them.

--dry runs all of it where there is no GPU (`gpu_dry.py`); its figures mean nothing.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from benchmarks.result import RESULTS, ROOT
from benchmarks.speed.gpu_device import RESTART

TUNED = ROOT / "kernels" / "qtk_kernels" / "tuned"
HOME = ("gpu_*.csv", "gpu_*.json", "sm_*.json")  # of RESULTS and TUNED
LOG = "gpu_run.log"
GRACE = 20.0  # seconds between a step's own end and its being killed


@dataclass(frozen=True)
class Step:
    """A program of a run.

    Attributes:
        module: what `python -m` starts.
        arguments: its own.
        minutes: what it gets at most; 0: it is not told, and takes what is left.
        again: further arguments when it is restarted behind a lost device.
    """

    module: str
    arguments: tuple[str, ...]
    minutes: float
    again: tuple[str, ...] = ()


def model(name: str, batch: int, minutes: float) -> Step:
    """A batch a process."""
    arguments = ("--model", name, "--batch", str(batch))
    return Step("benchmarks.speed.gpu_models", arguments, minutes, again=("--resume",))


def suite() -> tuple[str, ...]:
    """pytest, several processes where it can: an error that sticks to the device ends only one."""
    found = ["-q", "tests/kernels", "-p", "no:cacheprovider"]
    found += ["-n", "8", "--dist", "loadfile"] if find_spec("xdist") else []
    found += ["--timeout", "120"] if find_spec("pytest_timeout") else []
    skipped = ("aot", "aot_attention", "jit_gate", "run_gpu", "bench", "tune", "random_shapes",
               "packing")  # fmt: skip
    return (*found, *(f"--ignore=tests/kernels/test_{name}.py" for name in skipped))


CHECKS, KERNELS = "benchmarks.speed.gpu_checks", "benchmarks.speed.gpu_kernels"
STEPS = {
    "ceilings": Step(CHECKS, ("ceilings",), 0.7),
    "warm": Step("benchmarks.speed.gpu_warm", (), 1.2),
    "check": Step(CHECKS, ("check",), 3.0),
    "huge": Step(CHECKS, ("huge",), 0.8),
    "ptxas": Step(CHECKS, ("ptxas",), 1.2),
    "sanitize": Step(CHECKS, ("sanitize",), 2.0),
    "bench": Step(KERNELS, ("--first",), 5.0),
    "attention": Step("benchmarks.speed.gpu_attention", (), 3.5),
    "bulk": Step("benchmarks.speed.gpu_bulk", (), 0.8),
    "tune": Step("benchmarks.speed.gpu_tune", (), 3.5),
    "BERT-base:8": model("BERT-base", 8, 2.0),
    "BERT-base:1": model("BERT-base", 1, 1.2),
    "ViT-B:64": model("ViT-B", 64, 1.5),
    "tests": Step("pytest", suite(), 0.0),
    "packages": Step(KERNELS, ("--packages",), 7.0),
    "all-shapes": Step(KERNELS, (), 8.0),
    "BERT-base:64": model("BERT-base", 64, 2.5),
    "ViT-B:8": model("ViT-B", 8, 2.0),
    "ViT-B:1": model("ViT-B", 1, 1.5),
    "OPT-1.3b:8": model("OPT-1.3b", 8, 4.0),
    "OPT-1.3b:1": model("OPT-1.3b", 1, 4.0),
    "OPT-1.3b:64": model("OPT-1.3b", 64, 4.0),
}
CALLS = {
    "call1": ("ceilings", "warm", "check", "huge", "ptxas", "sanitize"),
    "call2": ("bench", "attention"),
    "call3": ("bulk", "tune", "BERT-base:8", "BERT-base:1", "ViT-B:64"),
}
CALLS["later"] = tuple(name for name in STEPS if not any(name in call for call in CALLS.values()))


@dataclass
class Run:
    """One command.

    Attributes:
        out: where results are brought.
        end: when the last step is killed, in `time.monotonic`.
        results, tuned: where steps write.
        prefix: what starts a program.
        begun: the clock of files when the run began: what is older was home before.
        dry: there is no GPU, and a step may take what is left.
    """

    out: Path
    end: float
    results: Path
    tuned: Path
    prefix: list[str]
    begun: float
    log: IO[str]
    dry: bool = False

    def bring_home(self) -> list[Path]:
        """Copies what steps have written since the run began; gives the copies."""
        found = []
        for path in written(self.results, self.tuned):
            if path.stat().st_mtime >= self.begun and path.parent != self.out:
                beside = self.out / f"{path.name}.part"
                shutil.copyfile(path, beside)
                found.append(beside.replace(self.out / path.name))
        return found

    def say(self, text: str) -> None:
        print(text, flush=True)
        self.log.write(text + "\n")
        self.log.flush()

    def step(self, name: str, few: int | None) -> bool:
        """Runs a step, once more where it lost the device; whether it went well."""
        step = STEPS[name]
        status = self.once(name, step, few)
        if status == RESTART or status < 0:
            self.say(f"== {name} lost its device or its process ({status}): once more, behind that")
            status = self.once(name, replace(step, arguments=step.arguments + step.again), few)
        if status:
            self.say(f"== {name} failed ({status})")
        return status == 0

    def once(self, name: str, step: Step, few: int | None) -> int:
        left = self.end - time.monotonic()
        most = step.minutes if step.minutes and not self.dry else left / 60
        minutes = min(most, (left - GRACE) / 60)
        if minutes <= 0:
            self.say(f"== {name}: no time left, not run")
            return 0
        told = ["--minutes", f"{minutes:.2f}"] if step.minutes else []
        told += ["--few", str(few)] if few and step.minutes else []
        command = [*self.prefix, step.module, *step.arguments, *told]
        self.say(f"== {name}: {step.module} {' '.join([*step.arguments, *told])}")
        begin = time.monotonic()
        status = self.watch(command, min(left, 60 * minutes + GRACE))
        self.bring_home()
        self.say(f"== {name}: {time.monotonic() - begin:.0f} s")
        return status

    def watch(self, command: list[str], seconds: float) -> int:
        """Runs a program in a group of its own, which is killed when its time is over."""
        child = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", start_new_session=True,
        )  # fmt: skip
        reader = threading.Thread(target=self.copy_lines, args=(child.stdout,), daemon=True)
        reader.start()
        end = time.monotonic() + seconds
        try:
            while child.poll() is None and time.monotonic() < end:
                try:
                    child.wait(timeout=min(5.0, max(end - time.monotonic(), 0.01)))
                except subprocess.TimeoutExpired:
                    self.bring_home()
            late = child.poll() is None
        finally:
            stop(child)
            reader.join(timeout=5)
        return 124 if late else child.returncode

    def copy_lines(self, printed: IO[str]) -> None:
        for line in printed:
            self.say(line.rstrip("\n"))


def stop(child: subprocess.Popen[str]) -> None:
    """Ends a program and all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def written(results: Path, tuned: Path) -> Iterator[Path]:
    for folder in dict.fromkeys((results, tuned)):
        for pattern in HOME:
            yield from sorted(folder.glob(pattern))


def take(folder: Path) -> int:
    """Puts what came home where the next run and the READMEs look for it."""
    from benchmarks import readme_tables
    from benchmarks.speed import gpu_tables

    TUNED.mkdir(exist_ok=True)
    for path in written(folder, folder):
        target = (TUNED if path.name.startswith("sm_") else RESULTS) / path.name
        if path.resolve() != target.resolve():
            shutil.copyfile(path, target)
        print(target.relative_to(ROOT))
    gpu_tables.main()
    return readme_tables.main()


def steps_of(names: list[str]) -> list[str]:
    """Of calls and steps."""
    found = [step for name in names for step in CALLS.get(name, (name,))]
    unknown = [name for name in found if name not in STEPS]
    if unknown:
        known = " ".join([*CALLS, *STEPS])
        raise SystemExit(f"no step called {' '.join(unknown)}; there are: take {known}")
    return found


def card() -> str:
    """What nvidia-smi says of the device and its clocks."""
    if shutil.which("nvidia-smi") is None:
        return "no nvidia-smi"
    asked = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def has_gpu() -> bool:
    """Asked in another process: this one never touches the device."""
    asked = [sys.executable, "-c", "import torch; assert torch.cuda.is_available()"]
    return subprocess.run(asked, capture_output=True, check=False).returncode == 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+", help=f"calls or steps: {' '.join([*CALLS, *STEPS])}")
    parser.add_argument("--minutes", type=float, default=9.0, help="of all steps together")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or RESULTS))
    parser.add_argument("--dry", action="store_true", help="without a GPU, for its errors")
    parser.add_argument("--few", type=int, help="so many cases a step")
    options = parser.parse_args(arguments)
    if options.names[0] == "take":
        return take(Path(options.names[1]))
    steps = steps_of(options.names)
    if not options.dry and not has_gpu():
        print("no GPU here: nothing is measured. What the compiler makes of the kernels instead:")
        return subprocess.run([sys.executable, "-m", KERNELS], cwd=ROOT, check=False).returncode
    options.out.mkdir(parents=True, exist_ok=True)
    return perform(steps, options)


def perform(steps: list[str], options: argparse.Namespace) -> int:
    """All steps, and the results home, whatever happens."""
    out, prefix, results, tuned = options.out.resolve(), [sys.executable, "-m"], RESULTS, TUNED
    if options.dry:
        results = tuned = out / "dry"
        results.mkdir(exist_ok=True)
        prefix += ["benchmarks.speed.gpu_dry", str(results)]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with (out / LOG).open("a", encoding="utf-8") as log:
        end = time.monotonic() + 60 * options.minutes
        run = Run(out, end, results, tuned, prefix, time.time() - 1, log, options.dry)
        run.say(card())
        try:
            well = [run.step(name, options.few) for name in steps]
        finally:
            home = run.bring_home()
            run.say(f"== home: {' '.join(path.name for path in home) or 'nothing new'}")
    return int(not all(well))


if __name__ == "__main__":
    sys.exit(main())
