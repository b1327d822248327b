import pytest
import torch

from qtk_kernels import _dispatch
from qtk_kernels._dispatch import backend_of, cpu_has_int8, use_backend


def test_explicit_backend_wins_over_the_forced_one():
    x = torch.zeros(1)
    with use_backend("reference"):
        assert backend_of(x) == "reference" and backend_of(x, "auto") == "reference"
        assert backend_of(x, "cpu") == "cpu"
        with use_backend("auto"):
            assert backend_of(x) == "cpu"
    assert backend_of(x) == "cpu"


def test_backend_is_restored_after_an_error():
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert backend_of(torch.zeros(1)) == "cpu"


def test_unknown_backend_lists_what_there_is():
    with pytest.raises(ValueError, match=r"unknown backend 'cuda', expected one of .*triton"):
        backend_of(torch.zeros(1), "cuda")


def test_triton_on_a_cpu_tensor_raises_without_the_interpreter(monkeypatch):
    monkeypatch.setattr(_dispatch, "INTERPRETED", False)
    with pytest.raises(ValueError, match="needs a CUDA tensor, got one on cpu"):
        backend_of(torch.zeros(1), "triton")


def test_missing_triton_is_named(monkeypatch):
    monkeypatch.setattr(_dispatch, "triton", None)
    with pytest.raises(ValueError, match="not installed"):
        backend_of(torch.zeros(1), "triton")


def test_int8_instructions_can_be_denied(monkeypatch):
    monkeypatch.setenv("QTK_CPU_INT8", "0")
    assert not cpu_has_int8()
