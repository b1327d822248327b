"""Some of the gate of `jit_gate.py`, in a process of its own: the interpreter compiles nothing."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def gate(cache, *arguments):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        "TRITON_CACHE_DIR": str(cache),
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.jit_gate", *arguments],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr[-2000:]


@pytest.fixture(scope="module", params=["86", "90"], ids=lambda arch: f"sm_{arch}")
def reported(request, tmp_path_factory):
    if find_spec("triton") is None:
        pytest.skip("needs triton")
    found = gate(tmp_path_factory.mktemp("cache"), "--only", "reported", "--arch", request.param)
    return request.param, found[1]


NAMES = [
    "one token in parts", "output zero point 1", "float32 heads",
    "float32, four bits and a zero point", "float32 tokens", "heads of 256 channels",
    "float32 heads of 256 channels", "two channels", "32 tokens of W4A8",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_what_once_failed_compiles_fits_and_does_not_spill(reported, name):
    """The bounds are those of `tests/kernels/jit_reported.py`."""
    arch, said = reported
    assert f" of {len(NAMES)} fail" in said, said
    assert [line for line in said.splitlines() if line.startswith(f"sm_{arch} {name}: ")] == []


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("arch, few", [
    ("90", "2"),
    *(pytest.param(arch, few, marks=pytest.mark.slow)  # minutes of compiling
      for arch, few in (("80", "8"), ("86", "8"), ("90", "16"), ("100", "8"))),
])  # fmt: skip
def test_launches_compile_and_fit_the_card(tmp_path, arch, few):
    """A sample of each op of what `make gpu-gate` compiles."""
    code, said = gate(tmp_path, "--arch", arch, "--few", few)
    assert code == 0, said
