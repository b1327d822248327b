"""benchmarks/run_gpu.sh: its steps, what it brings home, and a run of it without a GPU."""

import json
import os
import shutil
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, distribution, files, requires, version
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from benchmarks.speed import gpu_checks, gpu_run
from benchmarks.speed.gpu_models import MODELS
from tests.gpu.check import CHECKS

ROOT = Path(__file__).resolve().parents[2]
COMPILES = pytest.mark.skipif(
    find_spec("triton") is None or shutil.which("bash") is None, reason="needs triton and bash"
)


def test_calls_hold_every_step_once_and_fit_their_minutes():
    named = [step for call in gpu_run.CALLS.values() for step in call]
    assert sorted(named) == sorted(gpu_run.STEPS)
    for call in ("call1", "call2", "call3"):
        assert sum(gpu_run.STEPS[name].minutes for name in gpu_run.CALLS[call]) <= 9
    assert {
        step.arguments[1] for step in gpu_run.STEPS.values() if "--model" in step.arguments
    } == (set(MODELS))
    assert set(gpu_checks.OPS) == set(CHECKS)
    with pytest.raises(SystemExit, match="no step called tea"):
        gpu_run.steps_of(["call1", "tea"])


@pytest.mark.parametrize("name", [n for n in gpu_run.STEPS if n != "tests"])
def test_every_step_is_a_program_that_takes_its_arguments(name):
    step = gpu_run.STEPS[name]
    source = Path(find_spec(step.module).origin).read_text()
    flags = ["--minutes", "--few", *(a for a in (*step.arguments, *step.again) if a[:2] == "--")]
    assert all(f'"{flag}"' in source for flag in flags)


@pytest.fixture
def started(tmp_path, monkeypatch):
    """A run whose programs are Python that a test gives it."""

    def start(minutes=1.0, **programs):
        steps = {n: gpu_run.Step("-c", (text,), 0.0) for n, text in programs.items()}
        monkeypatch.setattr(gpu_run, "STEPS", steps)
        results, out = tmp_path / "results", tmp_path / "out"
        results.mkdir(exist_ok=True)
        out.mkdir(exist_ok=True)
        log = (out / "log").open("w")
        end = time.monotonic() + 60 * minutes
        return gpu_run.Run(out, end, results, results, [sys.executable], time.time() - 1, log)

    return start


def test_what_a_step_wrote_is_brought_home_also_when_it_is_killed(started, monkeypatch):
    monkeypatch.setattr(gpu_run, "GRACE", 0.0)
    text = "import time; open({!r}, 'w').write('1'); print('said', flush=True); time.sleep(60)"
    run = started(minutes=0.05)
    gpu_run.STEPS["slow"] = gpu_run.Step("-c", (text.format(f"{run.results}/gpu_a.json"),), 0.0)
    old = run.results / "gpu_old.json"
    old.write_text("home before")
    os.utime(old, (0, 0))
    assert not run.step("slow", None)
    assert [path.name for path in run.out.glob("*.json")] == ["gpu_a.json"]
    assert "said" in (run.out / "log").read_text()
    assert run.step("slow", None) and "not run" in (run.out / "log").read_text()


def test_a_step_that_loses_the_device_is_restarted_once(started):
    run = started(
        lost=f"raise SystemExit({gpu_run.RESTART})", failed="raise SystemExit(1)", good=""
    )
    assert [run.step(name, None) for name in ("lost", "failed", "good")] == [False, False, True]
    log = (run.out / "log").read_text()
    assert log.count("== lost: -c") == 2 and log.count("== failed: -c") == 1


def test_a_check_goes_on_behind_the_case_that_ended_its_process(monkeypatch):
    answers = [
        ["case W8A8 0", "case W8A8 1", "Segmentation fault", "status -11"],
        ["case W8A8 2", "W8A8, seed 2: AssertionError: 1 beyond the bound", "status 1"],
    ]
    commands = []
    monkeypatch.setattr(
        gpu_checks, "lines_of", lambda command, *_: commands.append(command) or answers.pop(0)
    )
    rows = gpu_checks.check_op("W8A8", 3, 1.0)
    assert rows[0] == ["W8A8", "3 of 3 random cases, 2 failed"]
    assert "seed 1 ended the process (status -11)" in rows[1][1]
    assert commands[1][-2:] == ["--start", "2"]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What git tracks, as it is now, where no data lie beside it."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs a checkout")
    folder = tmp_path_factory.mktemp("fresh") / "qtk"
    named = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    for name in named.stdout.decode().split("\0")[:-1]:
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def closure(lines: list[str]) -> set[str]:
    """Names of the packages that these requirements install here.

    Raises:
        PackageNotFoundError: one that is not installed.
    """
    wanted, found = [Requirement(line) for line in lines], set()
    while wanted:
        one = wanted.pop()
        if one.name in found or (one.marker and not one.marker.evaluate({"extra": ""})):
            continue
        found.add(one.name)
        assert one.specifier.contains(version(one.name), prereleases=True), one
        wanted += map(Requirement, requires(one.name) or [])
    return found


@pytest.fixture(scope="module")
def python(clone: Path) -> Path:
    """Of an environment with what the requirements of a GPU run need, and nothing else."""
    lines = (clone / "benchmarks" / "requirements-gpu.txt").read_text().splitlines()
    try:
        packages = closure([line for line in lines if line and line[0] != "#"])
    except PackageNotFoundError as absent:
        pytest.skip(f"needs {absent}")
    folder = clone.parent / "venv"
    subprocess.run([sys._base_executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for package in packages:
        for top in {file.parts[0] for file in files(package) or ()} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(distribution(package).locate_file(top))))
    return folder / "bin" / "python"


def dry(root: Path, python: Path, out: Path, *names: str, few: int = 2, limit: int = 900) -> str:
    """Runs the script; gives what it printed."""
    drop = ("TRITON_INTERPRET", "PYTHONPATH", "QTK_BACKEND")
    env = {k: v for k, v in os.environ.items() if k not in drop}
    env |= {"PYTHON": str(python), "TRITON_CACHE_DIR": str(out / "cache")}
    command = ["bash", str(root / "benchmarks" / "run_gpu.sh"), *names, "--dry", "--few", str(few)]
    command += ["--out", str(out), "--minutes", "60"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=limit)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    return done.stdout


@COMPILES
def test_a_fresh_clone_runs_dry_with_the_packages_it_lists(clone, python, tmp_path):
    """Steps of each kind, some cases of each: from the script to the tables at home."""
    printed = dry(clone, python, tmp_path, "ceilings", "bench", "BERT-base:1", "tests", few=2)
    assert "No module named" not in printed and "Error" not in printed
    names = ("checks", "kernels", "models")
    checks, kernels, models = (
        json.loads((tmp_path / f"gpu_{name}_imagined_gpu.json").read_text())["rows"]
        for name in names
    )
    assert [row[1] for row in checks] == ["bytes", "bf16", "int8", "fp8"]
    assert kernels[0][0] == "shift_scale_quantize"
    assert [row[3] for row in models if row[4]] == ["bfloat16, compiled", "qtk W8A8"]
    assert "tests/kernels/test_int8_linear.py: " in printed  # collected


@pytest.mark.slow  # compiles for minutes
@COMPILES
@pytest.mark.parametrize("call", gpu_run.CALLS)
def test_every_call_runs_dry_and_no_case_fails(clone, python, tmp_path, call):
    printed = dry(clone, python, tmp_path, call, limit=3000)
    assert "Error" not in printed and "not run" not in printed
    home = [path for path in tmp_path.iterdir() if path.suffix in (".csv", ".json")]
    assert 0 < len(home) <= 7
