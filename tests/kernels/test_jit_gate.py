"""Some of the gate of `jit_gate.py`, in a process of its own: the interpreter compiles nothing."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow  # minutes of compiling; `make gpu-gate` compiles all
@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("arch, few", [("90", "16"), ("86", "6")])
def test_launches_compile_and_fit_the_card(tmp_path, arch, few):
    """A sample of what `make gpu-gate` compiles."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        "TRITON_CACHE_DIR": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.jit_gate", "--arch", arch, "--few", few],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
