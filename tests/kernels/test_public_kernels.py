"""What stands outside the kernel package, and what it needs to be there."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "qtk").rglob("*.py")), ids=lambda p: p.stem)
def test_qtk_imports_no_private_kernel_module(path):
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    ours = [name for name in names if name.startswith("qtk_kernels")]
    assert [name for name in ours if "._" in name] == []


BLOCK = """
import sys, torch

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise {error}

sys.meta_path.insert(0, Block())
"""
PROGRAM = """
import pkgutil, importlib, qtk_kernels
for module in pkgutil.iter_modules(qtk_kernels.__path__):
    importlib.import_module(f"qtk_kernels.{module.name}")
from qtk_kernels.codes import Codes
from qtk_kernels.dispatch import has_triton
from qtk_kernels.shift_scale_quantize import shift_scale_quantize
assert not has_triton()
q, _ = shift_scale_quantize(torch.ones(2, 8), None, None, Codes(8))
assert q.tolist() == [[1] * 8] * 2
try:
    shift_scale_quantize(torch.ones(2, 8), None, None, Codes(8), backend="triton")
except ValueError as error:
    assert "triton, which cannot be imported" in str(error), error
else:
    raise AssertionError
"""


@pytest.mark.parametrize("error", [
    "ModuleNotFoundError(\"No module named 'triton'\", name='triton')",
    "ImportError('libcuda.so.1: cannot open shared object file')",
    "RuntimeError('0 active drivers')",
], ids=["absent", "no driver", "anything"])  # fmt: skip
def test_kernels_import_without_triton(error):
    done = subprocess.run(
        [sys.executable, "-c", BLOCK.format(error=error) + PROGRAM],
        env={"PYTHONPATH": f"{ROOT / 'kernels'}"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
