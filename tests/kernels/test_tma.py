"""Products whose tiles are copied in bulk: when they run, and that they compute the same."""

import pytest
import torch

from qtk_kernels import _launch, _tma, fp8_linear, int8_linear
from qtk_kernels.codes import Codes

H100 = _launch.Card("NVIDIA H100", (9, 0), 132)
GPU = torch.device("cuda", 0)
SMALL = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 128, "GROUP_M": 8, "num_warps": 4,
         "num_stages": 3}  # fmt: skip


@pytest.fixture
def bulk(monkeypatch):
    """Small tiles on the CPU, and a list of the launches."""
    launched = []

    def spy(*args):
        launched.append(args[0].options["FP8"])
        return _tma.launch_tma(*args)

    for module in (int8_linear, fp8_linear):
        monkeypatch.setattr(module, "tma_tile", lambda *_, **__: SMALL)
        monkeypatch.setattr(module, "launch_tma", spy)
    return launched


@pytest.mark.parametrize("M, N, K, dynamic, out", [
    (17, 40, 272, True, {"out_dtype": torch.float16}), (1, 1, 16, False, {}),
    (33, 70, 400, False, {"out_codes": Codes(8), "out_step": 0.5, "out_zero_point": 3}),
    (16, 32, 256, True, {"activation": "relu"}),
], ids=str)  # fmt: skip
def test_integers_give_the_same_bits(bulk, M, N, K, dynamic, out):
    x, w = (torch.randint(-128, 128, (n, K), dtype=torch.int8) for n in (M, N))
    args = {"x_scale": torch.rand(M, 1) if dynamic else None, **out}
    got, want = (
        int8_linear.int8_linear(x, w, torch.rand(N, 1, generator=torch.Generator().manual_seed(1)),
                                torch.arange(N) / 9, **args, backend=backend)
        for backend in ("triton", "reference")
    )  # fmt: skip
    assert torch.equal(got, want) and bulk == [False]


@pytest.mark.parametrize("M, N, K", [(17, 40, 272), (1, 1, 16)], ids=str)
def test_e4m3_is_summed_in_float32(bulk, M, N, K):
    (x, x_scale), (w, w_scale) = (fp8_linear.to_fp8(torch.randn(n, K)) for n in (M, N))
    bias = torch.randn(N)
    got, want = (
        fp8_linear.fp8_linear(x, w, w_scale, bias, x_scale=x_scale, backend=backend)
        for backend in ("triton", "reference")
    )
    magnitude = x.double().abs() @ (w.double() * w_scale).abs().T * x_scale + bias.abs()
    assert ((got - want).abs() <= (K + 8) * 2.0**-24 * magnitude).all() and bulk == [True]


@pytest.mark.parametrize("kind", ["groups", "zero point", "wide rows", "unaligned", "unsigned"])
def test_what_no_bulk_copy_brings_goes_to_the_other_kernel(bulk, kind):
    M, N, K = 5, 8, 256
    x, w = (torch.randint(-9, 9, (n, K), dtype=torch.int8) for n in (M, N))
    G, args = 1, {}
    if kind == "groups":
        G, args = 2, {"group_size": 128}
    elif kind == "zero point":
        args = {"x_zero_point": 1}
    elif kind == "wide rows":
        x = torch.cat([x, x], -1)[:, :K]
    elif kind == "unaligned":
        x = torch.cat([x.flatten()[:1], x.flatten()])[1:].view(M, K)
    else:  # as int8 it has a zero point
        x = x.view(torch.uint8)
    scale = torch.rand(N, G)
    got = int8_linear.int8_linear(x, w, scale, **args, backend="triton")
    want = int8_linear.int8_linear(x, w, scale, **args, backend="reference")
    assert bulk == [] and torch.allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("M, N, K, wide", [
    (8192, 4096, 4096, True), (2048, 1536, 4096, False), (512, 768, 768, None),
    (4096, 768, 768, False), (8192, 4096, 4100, None), (500, 65536, 4096, None),
    (8192, 4096, 128, None),
], ids=str)  # fmt: skip
def test_shapes_that_fill_a_hopper_take_it(monkeypatch, M, N, K, wide):
    monkeypatch.setattr(_tma, "card_of", lambda device: H100)
    monkeypatch.setattr(_tma, "measured", lambda *_, **__: None)
    tile = _tma.tma_tile("int8_linear", M, N, K, device=GPU, plain=True)
    assert (tile is None) == (wide is None)
    assert tile is None or tile["BLOCK_N"] == (256 if wide else 128)
    for op, plain in (("fp8_linear", True), ("int8_linear", False)):  # registers would not do
        other = _tma.tma_tile(op, M, N, K, device=GPU, plain=plain)
        assert (other is None) == (tile is None) and (other or {}).get("BLOCK_N") != 256


def test_other_cards_measured_tiles_and_forced_ones_come_first(monkeypatch):
    shape = ("int8_linear", 8192, 4096, 4096)
    monkeypatch.setattr(_tma, "measured", lambda *_, **__: None)
    for capability in ((8, 9), (10, 0), (12, 0)):
        card = H100._replace(capability=capability)
        monkeypatch.setattr(_tma, "card_of", lambda device, card=card: card)
        assert _tma.tma_tile(*shape, device=GPU, plain=True) is None
    assert _tma.tma_tile(*shape, device=torch.device("cpu"), plain=True) is None
    monkeypatch.setattr(_tma, "card_of", lambda device: H100)
    assert _tma.tma_tile(*shape, device=GPU, plain=True) is not None
    with _launch.use_tile({}):
        assert _tma.tma_tile(*shape, device=GPU, plain=True) is None
    monkeypatch.setattr(_tma, "measured", lambda *_, **__: {"BLOCK_M": 64})
    assert _tma.tma_tile(*shape, device=GPU, plain=True) is None
