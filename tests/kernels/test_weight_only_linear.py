import pytest
import torch

from qtk_kernels.packing import pack_int4
from qtk_kernels.weight_only_linear import (
    prepare_weight_only,
    restore_weight_only,
    weight_only_kernel_name,
    weight_only_linear,
)

ULP = 2.0**-24
SHAPES = [(1, 1, 1), (5, 24, 7), (33, 70, 197), (2, 16, 256)]  # M, N, K


def inputs(M, N, K, bits, group_size, zero_point, dtype):
    G = -(-K // group_size) if group_size else 1
    w_q = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (N, K), dtype=torch.int8)
    zero_points = torch.randn(N, G) * 3 if zero_point else None
    return torch.randn(M, K).to(dtype), w_q, torch.rand(N, G), torch.randn(N), zero_points


def exact_value(x, w_q, w_scale, bias, zero_point, group_size):
    """y in float64, and the sum of magnitudes whose float32 roundings may add up."""
    K = x.shape[1]
    step = w_scale.double().repeat_interleave(group_size or K, 1)[:, :K]
    zero = torch.zeros_like(step)
    if zero_point is not None:
        zero = zero_point.double().repeat_interleave(group_size or K, 1)[:, :K]
    y = x.double() @ ((w_q - zero) * step).T + bias
    return y, x.double().abs() @ ((w_q.double().abs() + zero.abs()) * step).T + bias.abs()


@pytest.mark.parametrize("backend", ["triton", "cpu", "reference"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("group_size", [None, 20, 32, 128])
@pytest.mark.parametrize("zero_point", [False, True])
def test_product_in_float32(shape, bits, group_size, zero_point, backend):
    x, w_q, w_scale, bias, zero = inputs(*shape, bits, group_size, zero_point, torch.float32)
    operand = prepare_weight_only(
        pack_int4(w_q) if bits <= 4 else w_q, bits=bits, in_features=shape[2], backend=backend
    )
    y = weight_only_linear(
        x, operand, w_scale, bias, w_zero_point=zero, bits=bits, in_features=shape[2],
        group_size=group_size, backend=backend,
    )  # fmt: skip
    exact, magnitude = exact_value(x, w_q, w_scale, bias, zero, group_size)
    assert ((y - exact).abs() <= (shape[2] + 8) * ULP * magnitude).all()


@pytest.mark.parametrize("backend", ["triton", "cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero_point", [False, True])
def test_product_in_16_bits(dtype, bits, zero_point, backend):
    """A rounding of the result, and on a CPU one of every weight and of the bias, to x's dtype."""
    M, N, K, group_size = 5, 48, 256, 64
    x, w_q, w_scale, bias, zero = inputs(M, N, K, bits, group_size, zero_point, dtype)
    w_scale *= 0.1
    args = {"w_zero_point": zero, "bits": bits, "in_features": K, "group_size": group_size}
    operand = prepare_weight_only(
        pack_int4(w_q) if bits <= 4 else w_q, bits=bits, in_features=K, backend=backend
    )
    y = weight_only_linear(x, operand, w_scale, bias, **args, backend=backend)
    assert y.dtype == dtype
    exact, magnitude = exact_value(x, w_q, w_scale, bias, zero, group_size)
    eps = torch.finfo(dtype).eps
    tolerance = eps * exact.abs() + (K + 8) * ULP * magnitude
    if backend == "cpu":
        tolerance = tolerance + eps * magnitude
    assert ((y - exact).abs() <= tolerance).all()


@pytest.mark.parametrize("backend", ["triton", "cpu", "reference"])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_code_is_decoded(bits, backend):
    """The identity times every code, at a scale of one, is the code."""
    K = 2**bits
    w_q = (torch.arange(K) - K // 2).to(torch.int8).expand(3, K).contiguous()
    operand = prepare_weight_only(
        pack_int4(w_q) if bits == 4 else w_q, bits=bits, in_features=K, backend=backend
    )
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        y = weight_only_linear(
            torch.eye(K, dtype=dtype), operand, torch.ones(3, 1), bits=bits, in_features=K,
            backend=backend,
        )  # fmt: skip
        assert torch.equal(y, w_q.T.to(dtype))


@pytest.mark.parametrize("backend", ["triton", "cpu", "reference"])
def test_leading_dimensions_strides_and_empty_batch(backend):
    _, w_q, w_scale, bias, _ = inputs(1, 24, 64, 8, None, False, torch.float32)
    args = {"bits": 8, "in_features": 64, "backend": backend}
    x = torch.randn(2, 3, 64)
    want = weight_only_linear(x, w_q, w_scale, bias, **args)
    wide = torch.cat([x, x], -1)[..., :64]
    assert torch.equal(weight_only_linear(wide, w_q, w_scale, bias, **args), want)
    assert want.shape == (2, 3, 24)
    assert weight_only_linear(x[:0], w_q, w_scale, bias, **args).shape == (0, 3, 24)


def test_restoring_inverts_preparing():
    packed = pack_int4(torch.randint(-8, 8, (32, 256), dtype=torch.int8))
    for backend in ("triton", "cpu", "reference"):
        operand = prepare_weight_only(packed, bits=4, in_features=256, backend=backend)
        assert torch.equal(restore_weight_only(operand, bits=4, in_features=256), packed)


def test_kernel_names():
    w = torch.zeros(4, 8, dtype=torch.int8)
    assert weight_only_kernel_name(w, bits=8, backend="reference") == "reference"
    assert weight_only_kernel_name(w, bits=8, backend="triton") == "triton weight_only_linear"
    assert weight_only_kernel_name(w, bits=8) == "dequantize, then float linear"


def test_errors_say_what_was_expected():
    w, one = torch.zeros(4, 8, dtype=torch.int8), torch.ones(4, 1)
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., 8\], got \[1, 9\]"):
        weight_only_linear(torch.zeros(1, 9), w, one, bits=8, in_features=8)
    with pytest.raises(ValueError, match=r"4-bit weights over 8 channels need torch.uint8"):
        prepare_weight_only(w, bits=4, in_features=8)
    with pytest.raises(ValueError, match=r"w_zero_point must be \[4, 1\] .* got \[4, 2\]"):
        weight_only_linear(
            torch.zeros(1, 8), w, one, w_zero_point=torch.ones(4, 2), bits=8, in_features=8
        )


def test_compiles_to_one_graph():
    x, w_q, w_scale, bias, zero = inputs(4, 24, 256, 4, 64, True, torch.float32)
    operand = prepare_weight_only(pack_int4(w_q), bits=4, in_features=256)

    def run(x):
        return weight_only_linear(
            x, operand, w_scale, bias, w_zero_point=zero, bits=4, in_features=256, group_size=64
        )

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), run(x))
