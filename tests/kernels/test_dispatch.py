import os
import subprocess
import sys

import pytest
import torch

from qtk_kernels import dispatch
from qtk_kernels.dispatch import backend_of, cpu_has_int8, use_backend


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
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    with pytest.raises(ValueError, match="needs a CUDA tensor, got one on cpu"):
        backend_of(torch.zeros(1), "triton")


def test_missing_triton_is_named(monkeypatch):
    monkeypatch.setattr(dispatch, "triton", None)
    with pytest.raises(ValueError, match="cannot be imported"):
        backend_of(torch.zeros(1), "triton")


@pytest.mark.parametrize("has, said, want", [
    (True, None, True), (True, "0", False), (True, "1", True), (False, "1", True),
    (False, None, False), (False, "0", False),
])  # fmt: skip
def test_int8_needs_the_instructions_unless_somebody_says_otherwise(monkeypatch, has, said, want):
    """The same in a compiled graph, which must not break where a layer asks."""
    monkeypatch.setattr(dispatch, "HAS_INT8", has)
    monkeypatch.delenv("QTK_CPU_INT8", raising=False)
    if said is not None:
        monkeypatch.setenv("QTK_CPU_INT8", said)
    torch.compiler.reset()
    compiled = torch.compile(
        lambda x: x + 1 if cpu_has_int8() else x - 1, fullgraph=True, backend="eager"
    )
    assert cpu_has_int8() == want and compiled(torch.zeros(1)).item() == (1 if want else -1)


@pytest.mark.parametrize("w, a, exact", [(8, 8, False), (7, 8, True), (8, 7, True), (4, 4, True)])
def test_avx2_adds_two_products_of_fifteen_bits_in_sixteen(monkeypatch, w, a, exact):
    monkeypatch.delenv("QTK_CPU_INT8", raising=False)
    monkeypatch.setattr(dispatch, "HAS_INT8", False)
    monkeypatch.setattr(dispatch, "EXACT_BITS", 15)
    assert cpu_has_int8(w, a) == exact == (2 * (2**a - 1) * 2 ** (w - 1) < 2**15)
    monkeypatch.setattr(dispatch, "EXACT_BITS", 0)
    assert not cpu_has_int8(w, a)


@pytest.mark.parametrize("cap, has, want", [
    ("", ["avx512_vnni"], True), ("", [], False), ("all", ["amx_int8"], True),
    ("avx2", ["avx512_vnni", "avx_vnni"], False), ("AVX512_CORE", ["avx512_vnni"], False),
    ("AVX512_CORE_VNNI", ["avx512_vnni"], True),
    ("AVX2_VNNI", ["avx512_vnni"], False), ("AVX2_VNNI", ["avx512_vnni", "avx_vnni"], True),
])  # fmt: skip
def test_a_cap_of_onednn_hides_instructions(cap, has, want):
    """A CPU with VNNI under ONEDNN_MAX_CPU_ISA=AVX2 saturates as one without."""
    assert dispatch.int8_units(dict.fromkeys(has, True), cap) == want


@pytest.mark.parametrize("cap", ["AVX2", "AVX512_CORE", "AVX512_CORE_VNNI"])
def test_products_are_exact_under_a_cap_of_onednn(cap):
    """In a process of its own, which oneDNN reads its cap once in; on the largest codes."""
    code = (
        "import torch; from qtk_kernels.int8_linear import int8_linear, prepare_int8; "
        "x = torch.full((3, 64), 127, dtype=torch.int8); "
        "w = prepare_int8(torch.full((8, 64), 127, dtype=torch.int8)); "
        "y = int8_linear(x, w, torch.ones(8, 1), x_zero_point=-128); "
        "print(set(y.int().flatten().tolist()))"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "ONEDNN_MAX_CPU_ISA": cap},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert said.stdout.strip() == str({255 * 127 * 64})


class OnGpu:
    """A tensor on a card."""

    is_cuda, device, ndim, dtype = True, "cuda:0", 1, torch.float32

    def get_device(self):
        return 0


def test_a_card_without_triton_kernels_is_named(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.0")
    with pytest.raises(ValueError, match="needs an NVIDIA card, got one on ROCm"):
        backend_of(OnGpu())
    assert backend_of(OnGpu(), "reference") == "reference"


@pytest.mark.parametrize("capability, fits", [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_old_cards_are_refused_at_a_launch(monkeypatch, capability, fits):
    dispatch._check_card.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "imagined")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    if fits:
        assert dispatch.on_device(OnGpu()) is dispatch._HERE
    else:
        with pytest.raises(ValueError, match=r"capability 8.0 or higher, got 7.5 \(imagined\)"):
            dispatch.on_device(OnGpu())
    dispatch._check_card.cache_clear()
