import pytest
import torch

from qtk_kernels import _launch
from qtk_kernels.int4_linear import (
    int4_linear,
    int4_linear_kernel_name,
    prepare_int4,
    restore_int4,
)
from qtk_kernels.int8_linear import int8_linear
from qtk_kernels.packing import pack_int4

ULP = 2.0**-24
SHAPES = [(1, 1, 1), (5, 24, 7), (33, 70, 130), (2, 130, 1025)]  # M, N, K


def inputs(M, N, K, dtype=torch.int8):
    x_q = torch.randint(-128, 128, (M, K), dtype=torch.int8).view(dtype)
    w_q = torch.randint(-8, 8, (N, K), dtype=torch.int8)
    return x_q, w_q, torch.randn(N)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=str)
@pytest.mark.parametrize("dynamic", [False, True])
def test_w4a8_equals_int8_linear_on_the_same_codes(shape, dtype, dynamic):
    x_q, w_q, bias = inputs(*shape, dtype=dtype)
    w_scale = torch.rand(shape[1], 1)
    args = {"x_scale": torch.rand(shape[0], 1) if dynamic else None, "x_zero_point": 5}
    want = int8_linear(x_q, w_q, w_scale, bias, **args, backend="reference")
    for backend in ("triton", "reference"):
        operand = prepare_int4(pack_int4(w_q), shape[2], backend)
        y = int4_linear(x_q, operand, w_scale, bias, in_features=shape[2], **args, backend=backend)
        assert torch.equal(y, want)
    operand = prepare_int4(pack_int4(w_q), shape[2], "cpu")
    y = int4_linear(x_q, operand, w_scale, bias, in_features=shape[2], **args, backend="cpu")
    parts = (x_q.float() - 5).abs() @ w_q.float().abs().T * w_scale.T
    assert ((y - want).abs() <= 8 * ULP * (parts + bias.abs())).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("x_zero_point", [0, 3])
def test_w4a4_equals_int8_linear_on_the_same_codes(shape, x_zero_point):
    _, w_q, bias = inputs(*shape)
    x_q = torch.randint(-8, 8, (shape[0], shape[2]), dtype=torch.int8)
    w_scale, x_scale = torch.rand(shape[1], 1), torch.rand(shape[0], 1)
    args = {"x_scale": x_scale, "x_zero_point": x_zero_point}
    want = int8_linear(x_q, w_q, w_scale, bias, **args, backend="reference")
    for backend in ("triton", "reference"):
        y = int4_linear(
            pack_int4(x_q), pack_int4(w_q), w_scale, bias, in_features=shape[2], x_packed=True,
            **args, backend=backend,
        )  # fmt: skip
        assert torch.equal(y, want)


@pytest.mark.parametrize("group_size", [7, 20, 32, 64, 96, 100, 128, 256])
@pytest.mark.parametrize("x_packed", [False, True])
@pytest.mark.parametrize("grouped_x", [False, True])
def test_groups(group_size, x_packed, grouped_x):
    M, N, K = 5, 24, 290
    G = -(-K // group_size)
    x_q, w_q, bias = inputs(M, N, K)
    x_q = x_q.clamp(-8, 7) if x_packed else x_q
    w_scale, x_scale = torch.rand(N, G), torch.rand(M, G if grouped_x else 1)
    args = {"x_scale": x_scale, "group_size": group_size, "x_zero_point": 2}
    want = int8_linear(x_q, w_q, w_scale, bias, **args, backend="reference")
    # every group's part is rounded a few times, and the parts are added in another order
    parts = ((x_q.float() - 2).abs() * x_scale.amax()) @ w_q.float().abs().T * w_scale.amax(1)
    for backend in ("triton", "cpu", "reference"):
        y = int4_linear(
            pack_int4(x_q) if x_packed else x_q, prepare_int4(pack_int4(w_q), K, backend),
            w_scale, bias, in_features=K, x_packed=x_packed, **args, backend=backend,
        )  # fmt: skip
        assert ((y - want).abs() <= (G + 8) * ULP * (parts + bias.abs())).all()


@pytest.mark.parametrize("group_size", [None, 128])
def test_many_tokens_take_large_tiles(group_size, monkeypatch):
    monkeypatch.setattr(_launch, "SMS", 0)
    x_q, w_q, bias = inputs(130, 140, 256)
    args = {"x_scale": torch.rand(130, 1), "group_size": group_size, "in_features": 256}
    w_scale, packed = torch.rand(140, 2 if group_size else 1), pack_int4(w_q)
    y = int4_linear(x_q, packed, w_scale, bias, **args, backend="triton")
    want = int4_linear(x_q, packed, w_scale, bias, **args, backend="reference")
    if group_size is None:
        assert torch.equal(y, want)
    # a group's part is rounded in another order
    parts = x_q.float().abs() * args["x_scale"] @ w_q.float().abs().T * w_scale.amax(1)
    assert ((y - want).abs() <= 10 * ULP * (parts + bias.abs())).all()


def test_largest_products_do_not_overflow():
    packed = pack_int4(torch.full((2, 1025), -8, dtype=torch.int8))
    for x_packed, x in ((True, packed), (False, torch.full((2, 1025), -128, dtype=torch.int8))):
        y = int4_linear(
            x, packed, torch.ones(2, 1), in_features=1025, x_packed=x_packed, backend="triton"
        )
        assert (y == 1025 * 64 * (1 if x_packed else 16)).all()


@pytest.mark.parametrize("backend", ["triton", "cpu", "reference"])
def test_activation_dtype_and_empty_batch(backend):
    x_q, w_q, bias = inputs(3, 24, 130)
    operand, w_scale = prepare_int4(pack_int4(w_q), 130, backend), torch.rand(24, 1)
    args = {"in_features": 130, "backend": backend}
    y = int4_linear(x_q, operand, w_scale, bias, **args)
    relu = int4_linear(
        x_q, operand, w_scale, bias, activation="relu", out_dtype=torch.float16, **args
    )
    assert torch.equal(relu, y.clamp(min=0).half())
    assert int4_linear(x_q[:0], operand, w_scale, bias, **args).shape == (0, 24)


def test_restoring_inverts_preparing():
    packed = pack_int4(inputs(1, 24, 197)[1])
    for backend in ("triton", "cpu", "reference"):
        assert torch.equal(restore_int4(prepare_int4(packed, 197, backend), 197), packed)


def test_kernel_names():
    packed = pack_int4(inputs(1, 8, 16)[1])
    assert int4_linear_kernel_name(packed, backend="triton") == "triton int4_linear"
    assert int4_linear_kernel_name(packed, backend="reference") == "reference"
    name = int4_linear_kernel_name(prepare_int4(packed, 16, "cpu"))
    assert "unpacked" in name


def test_errors_say_what_was_expected():
    packed = pack_int4(inputs(1, 8, 100)[1])
    with pytest.raises(ValueError, match=r"200 channels need uint8 \[N, 128\], got .* \[8, 64\]"):
        prepare_int4(packed, 200)
    with pytest.raises(ValueError, match=r"x_q must be \[\.\.\., 64\] for 100 channels, got"):
        int4_linear(
            torch.zeros(1, 100, dtype=torch.uint8), packed, torch.ones(8, 1), in_features=100,
            x_packed=True,
        )  # fmt: skip


def test_compiles_to_one_graph():
    x_q, w_q, bias = inputs(4, 8, 130)
    operand, w_scale = prepare_int4(pack_int4(w_q), 130, "cpu"), torch.rand(8, 1)

    def run(x_q, operand):
        return int4_linear(x_q, operand, w_scale, bias, in_features=130)

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x_q, operand), run(x_q, operand))
