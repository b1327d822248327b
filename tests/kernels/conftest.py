"""What the kernel tests share: poisoned memory, and the comparison of codes."""

from pathlib import Path

import pytest
import torch

from qtk_kernels._plan import forget

ON_A_GPU = ("test_cuda_graphs", "test_aot", "test_aot_attention", "test_run_gpu")
ULP = 2.0**-24  # half the spacing of float32 at 1: the error of one rounding


def pytest_collection_modifyitems(items):
    """With a GPU the interpreter is off: tests that make CPU tensors run where there is none."""
    if not torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="runs in Triton's interpreter, where there is no GPU")
    for item in items:
        if Path(__file__).parent not in item.path.parents or item.path.stem in ON_A_GPU:
            continue
        if "device" not in getattr(item, "fixturenames", ()):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _poisoned_outputs(monkeypatch):
    """`torch.empty` returns garbage that no op writes by chance."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(77) if out.numel() else out

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(autouse=True)
def _fresh_plans():
    """Tests that change rules or replace kernels meet no plan that others made."""
    forget()
    yield
    forget()


@pytest.fixture
def assert_codes_agree():
    """Codes may differ by one, and only where the exact value is near a rounding boundary."""

    def check(q, q_ref, exact, tolerance):
        """exact: the value before rounding, float64; tolerance: its error in both results."""
        differ = (q.int() - q_ref.int()).abs()
        assert differ.max() <= 1 if differ.numel() else True
        boundary = (exact - exact.floor() - 0.5).abs()
        assert (boundary[differ > 0] <= tolerance.expand_as(exact)[differ > 0]).all()

    return check
