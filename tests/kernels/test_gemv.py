"""One or two tokens of four-bit weights: which kernel runs, and that it computes the same."""

import pytest
import torch

from qtk_kernels import _gemv, _launch, int4_linear, weight_only_linear
from qtk_kernels.codes import Codes
from qtk_kernels.packing import pack_int4

ULP = 2.0**-24
CARD = _launch.Card("NVIDIA H100", (9, 0), 132)
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def used(monkeypatch):
    """Names of the kernels that were launched; they run."""
    found = []

    class Spy:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            found.append(self.name)
            return self.kernel[grid]

    for module, name in (
        (weight_only_linear, "gemv_floats_kernel"), (int4_linear, "gemv_integers_kernel"),
        (weight_only_linear, "_weight_only_linear_kernel"), (int4_linear, "_int4_linear_kernel"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, Spy(name, getattr(module, name)))
    return found


def weights(N, K, group):
    G = -(-K // group) if group else 1
    return torch.randint(-8, 8, (N, K), dtype=torch.int8), torch.rand(N, G) * 0.1


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("M, N, K, group, zero", [
    (1, 5, 100, None, False), (2, 1, 4, None, True), (1, 24, 1028, 128, True),
    (2, 3, 256, 32, True), (2, 9, 200, 16, False),
], ids=str)  # fmt: skip
def test_floats_are_summed_in_float32(used, M, N, K, group, zero, dtype):
    """Every product is of code + 24, up to 31, and 24 times x is taken off again."""
    w_q, w_scale = weights(N, K, group)
    x, bias = torch.randn(M, K).to(dtype), torch.randn(N)
    zero_point = torch.randn(w_scale.shape) * 3 if zero else None
    y = weight_only_linear.weight_only_linear(
        x, pack_int4(w_q), w_scale, bias, w_zero_point=zero_point, bits=4, in_features=K,
        group_size=group, backend="triton",
    )  # fmt: skip
    step = w_scale.double().repeat_interleave(group or K, 1)[:, :K]
    offset = (
        0 if zero_point is None else zero_point.double().repeat_interleave(group or K, 1)[:, :K]
    )
    exact = x.double() @ ((w_q - offset) * step).T + bias
    magnitude = x.double().abs() @ ((31 + 24 + abs(offset)) * step).T + bias.abs()
    rounding = 0 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert y.dtype == dtype
    assert ((y - exact).abs() <= rounding * exact.abs() + (K + 8) * ULP * magnitude).all()
    assert used == ["gemv_floats_kernel"]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_code_of_every_nibble_is_exact(dtype):
    """One channel at a time, at a scale of one: the code, without an error of the 24."""
    K = 128
    w_q = ((torch.arange(K)[:, None] + torch.arange(16)) % 16 - 8).to(torch.int8).T.contiguous()
    rows = [
        weight_only_linear.weight_only_linear(
            row[None], pack_int4(w_q), torch.ones(16, 1), bits=4, in_features=K, backend="triton"
        ) for row in torch.eye(K, dtype=dtype)[[1, 66, 127]]
    ]  # fmt: skip
    wanted = w_q.T[[1, 66, 127]]
    assert torch.equal(torch.cat(rows), wanted.to(dtype))


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("M, N, K, out", [
    (1, 5, 100, {}), (2, 1, 4, {"activation": "relu"}),
    (2, 12, 1028, {"out_codes": Codes(8), "out_step": 0.5, "out_zero_point": 3}),
], ids=str)  # fmt: skip
def test_integer_sums_give_the_same_bits(used, M, N, K, out, unsigned):
    w_q, w_scale = weights(N, K, None)
    x = torch.randint(-128, 128, (M, K), dtype=torch.int8)
    args = {"in_features": K, "x_scale": torch.rand(M, 1), "x_zero_point": 3, **out}
    got, want = (
        int4_linear.int4_linear(
            x.view(torch.uint8) if unsigned else x, pack_int4(w_q), w_scale, torch.arange(N) / 7,
            **args, backend=backend,
        ) for backend in ("triton", "reference")
    )  # fmt: skip
    assert torch.equal(got, want)
    assert used == ["gemv_integers_kernel"]


@pytest.mark.parametrize("M, K, group, x_groups, zero_point", [
    (1, 1028, 128, False, 0), (2, 100, 32, True, -5), (1, 80, 16, True, 0), (2, 256, 64, False, 7),
], ids=str)  # fmt: skip
def test_groups_of_integers_add_up(used, M, K, group, x_groups, zero_point):
    """Two roundings a group, one in each of up to 32 sums over channels, and the last few."""
    N = 6
    w_q, w_scale = weights(N, K, group)
    G = w_scale.shape[1]
    x = torch.randint(-128, 128, (M, K), dtype=torch.int8)
    x_scale, bias = torch.rand(M, G if x_groups else 1), torch.randn(N)
    args = {"in_features": K, "group_size": group, "x_scale": x_scale, "x_zero_point": zero_point}
    got, want = (
        int4_linear.int4_linear(x, pack_int4(w_q), w_scale, bias, **args, backend=backend)
        for backend in ("triton", "reference")
    )
    part = (x.double() - zero_point).abs() @ w_q.double().abs().T
    magnitude = part * x_scale.amax(1, keepdim=True) * w_scale.amax(1) + bias.abs()
    assert ((got - want).abs() <= (4 * G + 48) * ULP * magnitude).all()
    assert used == ["gemv_integers_kernel"]


def test_a_view_of_rows_that_begin_on_words(used):
    w_q, w_scale = weights(8, 64, None)
    x = torch.randn(2, 96)[:, 16:80]
    args = {"bits": 4, "in_features": 64, "backend": "triton"}
    got = weight_only_linear.weight_only_linear(x, pack_int4(w_q), w_scale, **args)
    want = weight_only_linear.weight_only_linear(x.contiguous(), pack_int4(w_q), w_scale, **args)
    assert torch.equal(got, want)
    assert used == ["gemv_floats_kernel"] * 2


def run_odd(kind):
    """A call that has a reason to use tiles."""
    M, N, K, group = {"three tokens": (3, 4, 64, None), "odd channels": (1, 4, 66, None),
                      "odd groups": (1, 4, 64, 20)}.get(kind, (2, 4, 64, None))  # fmt: skip
    w_q, w_scale = weights(N, K, group)
    w = pack_int4(w_q)
    x = torch.randn(M, K)
    if kind == "unaligned tokens":
        x = torch.randn(M * K + 1)[1:].view(M, K)
    elif kind == "unaligned rows":
        x = torch.randn(M, K + 1)[:, :K]
    elif kind == "unaligned weights":
        flat = torch.empty(w.numel() + 4, dtype=torch.uint8)
        flat[4:] = w.flatten()
        w = flat[4:].view(w.shape)
    return (
        weight_only_linear.weight_only_linear(
            x, w, w_scale, bits=4, in_features=K, group_size=group, backend=backend
        ) for backend in ("triton", "reference")
    )  # fmt: skip


@pytest.mark.parametrize("kind", [
    "three tokens", "odd channels", "odd groups", "unaligned tokens", "unaligned rows",
    "unaligned weights",
])  # fmt: skip
def test_what_it_cannot_read_goes_to_tiles(used, kind):
    got, want = run_odd(kind)
    assert used == ["_weight_only_linear_kernel"]
    assert (got - want).abs().max() <= 80 * ULP * want.abs().max() * 64


def test_a_measured_tile_comes_first(tmp_path, monkeypatch):
    """And null in a table says that none is faster."""
    tile = {"BLOCK_M": 16, "BLOCK_N": 64, "GROUP_M": 8, "SWAP": True, "SPLIT_K": 4,
            "num_warps": 2, "num_stages": 4}  # fmt: skip
    gpu, op = torch.device("cuda", 0), "weight_only_linear W4A16"
    args = {"device": gpu, "group": 0, "row": 8192, "start": 0}
    monkeypatch.setattr(_launch, "card_of", lambda device: CARD)
    for measured in (tile, None):
        monkeypatch.setattr(_launch, "nearest", lambda *_, found=measured: found)
        found = _gemv.gemv_tile(op, 1, 4096, 4096, 2048, **args)
        assert (found is None) == (measured is not None)
    with _launch.use_tile(tile):
        assert _gemv.gemv_tile(op, 1, 4096, 4096, 2048, **args) is None


@pytest.mark.parametrize("N, programs", [(4096, 512), (768, 384), (100, 100)])
def test_few_channels_still_make_programs(N, programs):
    args = {"device": torch.device("cpu"), "group": 0, "row": 4096, "start": 0}
    tile = _gemv.gemv_tile("int4_linear W4A8", 1, N, 4096, 2048, **args)
    assert -(-N // tile["BLOCK_N"]) == programs


@pytest.mark.parametrize("op, M, N, few", [
    ("weight_only_linear W4A16", 1, 8192, True), ("weight_only_linear W4A16", 2, 8192, False),
    ("weight_only_linear W4A16", 1, 28672, False), ("int4_linear W4A8", 2, 28672, True),
    ("int4_linear W4A8", 3, 8192, False),
])  # fmt: skip
def test_large_weights_go_to_tiles_where_those_issue_less(op, M, N, few):
    args = {"device": torch.device("cpu"), "group": 0, "row": 8192, "start": 0}
    assert (_gemv.gemv_tile(op, M, N, 8192, 4096, **args) is not None) == few


def test_no_tokens_and_no_channels():
    w_q, w_scale = weights(4, 64, None)
    args = {"bits": 4, "in_features": 64, "backend": "triton"}
    assert weight_only_linear.weight_only_linear(
        torch.zeros(0, 64), pack_int4(w_q), w_scale, **args
    ).shape == (0, 4)
    assert weight_only_linear.weight_only_linear(
        torch.zeros(1, 64), pack_int4(w_q[:0]), w_scale[:0], **args
    ).shape == (1, 0)
