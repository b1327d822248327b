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
