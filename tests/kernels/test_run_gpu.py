"""benchmarks/run_gpu.sh with a Python that only notes what it was asked for."""

import os
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.speed.gpu_models import MODELS
from tests.gpu.check import CHECKS

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "run_gpu.sh"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def run(tmp_path: Path, *arguments: str, gpu: bool = True, fails: str = "nothing") -> tuple:
    """The exit status, and the command lines of every Python."""
    log, python = tmp_path / "log", tmp_path / "python"
    log.write_text("")
    no_gpu = "" if gpu else '[ "$1" = -c ] && exit 1\n'
    python.write_text(
        f'#!/usr/bin/env bash\n{no_gpu}echo "$*" >> {log}\ncase "$*" in *{fails}*) exit 3;; esac\n'
    )
    python.chmod(0o755)
    env = {**os.environ, "PYTHON": str(python)}
    done = subprocess.run(
        ["bash", str(SCRIPT), *arguments], env=env, capture_output=True, text=True
    )
    return done.returncode, log.read_text().splitlines()


def test_every_step_calls_a_program_that_takes_its_arguments(tmp_path):
    status, lines = run(tmp_path)
    assert status == 0
    modules = {match[1] for line in lines if (match := re.match(r"-m (\S+)", line))}
    assert modules == {
        "tests.gpu.check", "pytest", "qtk", "benchmarks.speed.gpu_kernels",
        "benchmarks.speed.gpu_attention", "benchmarks.speed.gpu_models",
    }  # fmt: skip
    for line in lines:
        match = re.match(r"-m ((?:benchmarks|tests)\.\S+)", line)
        if match:
            spec = find_spec(match[1])
            source = Path(spec.origin).read_text()
            assert all(f'"{flag}"' in source for flag in re.findall(r"--\w+", line))
    checked = {line.split("--only ")[1].split()[0] for line in lines if "--only" in line}
    assert checked == set(CHECKS)
    measured = {line.split("--model ")[1].split()[0] for line in lines if "--model" in line}
    assert measured == set(MODELS)
    assert lines[-1] == "benchmarks/readme_tables.py"
    minutes = [float(m) for m in re.findall(r"--minutes (\S+)", "\n".join(lines))]
    assert minutes and max(minutes) <= 8


def test_one_step_runs_alone(tmp_path):
    _, lines = run(tmp_path, "tune")
    assert [line for line in lines if not line.startswith("-c")] == [
        "-m qtk tune --minutes 8", "benchmarks/readme_tables.py"
    ]  # fmt: skip


def test_a_step_that_fails_fails_the_script_but_not_the_others(tmp_path):
    status, lines = run(tmp_path, fails="W4A4")
    assert status == 1 and "-m qtk tune --minutes 8" in lines


def test_without_a_gpu_the_bench_says_what_it_can(tmp_path):
    status, lines = run(tmp_path, gpu=False)
    assert status == 0 and lines == ["-m benchmarks.speed.gpu_kernels"]
