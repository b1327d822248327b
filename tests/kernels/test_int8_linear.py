import pytest
import torch

from qtk_kernels import _launch
from qtk_kernels.codes import Codes
from qtk_kernels.int8_linear import (
    fold_zero_point,
    int8_linear,
    int8_linear_kernel_name,
    prepare_int8,
    restore_int8,
)

ULP = 2.0**-24
SHAPES = [(1, 1, 1), (5, 24, 7), (33, 70, 130), (2, 130, 1025)]  # M, N, K


def codes(*shape, dtype=torch.int8):
    return torch.randint(-128, 128, shape, dtype=torch.int8).view(dtype)


def exact_value(x_q, w_q, w_scale, bias, x_scale=None, x_zero_point=0, group_size=None):
    """y in float64, and what float32 may make of it.

    Integers are exact; every scaled part is rounded a few times, and parts are added in any order.
    """
    K = x_q.shape[1]
    size, G = group_size or K, -(-K // (group_size or K))
    w_step = w_scale.double().expand(-1, G).repeat_interleave(size, 1)[:, :K]
    x = x_q.double() - x_zero_point
    if x_scale is not None:
        x = x * x_scale.double().expand(-1, G).repeat_interleave(size, 1)[:, :K]
    w = w_q.double() * w_step
    return x @ w.T + bias, (G + 8) * ULP * (x.abs() @ w.abs().T + bias.abs())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=str)
@pytest.mark.parametrize("x_zero_point", [0, 3])
@pytest.mark.parametrize("dynamic", [False, True])
def test_one_group(shape, dtype, x_zero_point, dynamic):
    """Triton does the arithmetic of the reference in its order; oneDNN rounds differently."""
    M, N, K = shape
    x_q, w_q, w_scale, bias = (
        codes(M, K, dtype=dtype),
        codes(N, K),
        torch.rand(N, 1),
        torch.randn(N),
    )
    args = {"x_zero_point": x_zero_point, "x_scale": torch.rand(M, 1) if dynamic else None}
    y_ref = int8_linear(x_q, w_q, w_scale, bias, **args, backend="reference")
    y = int8_linear(x_q, w_q, w_scale, bias, **args, backend="triton")
    assert torch.equal(y, y_ref)
    exact, tolerance = exact_value(x_q, w_q, w_scale, bias, **args)
    y_cpu = int8_linear(x_q, prepare_int8(w_q, "cpu"), w_scale, bias, **args, backend="cpu")
    for y in (y_ref, y_cpu):
        assert ((y - exact).abs() <= tolerance).all()


@pytest.mark.parametrize("group_size", [20, 32, 64, 96, 100, 256])
@pytest.mark.parametrize("grouped_x", [False, True])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=str)
def test_groups(group_size, grouped_x, dtype):
    M, N, K = 5, 24, 290
    G = -(-K // group_size)
    x_q, w_q, bias = codes(M, K, dtype=dtype), codes(N, K), torch.randn(N)
    w_scale = torch.rand(N, G)
    args = {"x_scale": torch.rand(M, G if grouped_x else 1), "group_size": group_size,
            "x_zero_point": 2}  # fmt: skip
    exact, tolerance = exact_value(x_q, w_q, w_scale, bias, **args)
    for backend in ("triton", "cpu", "reference"):
        y = int8_linear(x_q, prepare_int8(w_q, backend), w_scale, bias, **args, backend=backend)
        assert ((y - exact).abs() <= tolerance).all()


@pytest.mark.parametrize("backend", ["triton", "cpu", "reference"])
def test_grouped_activations_with_one_weight_scale(backend):
    x_q, w_q, w_scale, bias = codes(3, 96), codes(8, 96), torch.rand(8, 1), torch.randn(8)
    args = {"x_scale": torch.rand(3, 3), "group_size": 32}
    exact, tolerance = exact_value(x_q, w_q, w_scale, bias, **args)
    y = int8_linear(x_q, prepare_int8(w_q, backend), w_scale, bias, **args, backend=backend)
    assert ((y - exact).abs() <= tolerance).all()


@pytest.mark.parametrize("dynamic", [False, True])
def test_portable_path_is_exact(monkeypatch, dynamic):
    """Partial sums of 512 channels are exact, and added as integers."""
    monkeypatch.setenv("QTK_CPU_INT8", "0")
    x_q = torch.full((2, 2000), 255, dtype=torch.uint8)
    w_q = torch.full((3, 2000), -127, dtype=torch.int8)
    # large odd partial sums of a small total, in which a lost bit shows
    w_q[:, 1000:], w_q[:, 0] = 127, -126
    x_scale = torch.rand(2, 1) if dynamic else None
    operand = prepare_int8(w_q, "cpu")
    assert torch.equal(operand, w_q)
    assert int8_linear_kernel_name(operand) == "float32 chunks (no int8 instructions)"
    for x, zero_point in ((x_q, 0), (x_q * 0 + 2, 255), (codes(2, 2000, dtype=torch.uint8), 7)):
        args = {"w_scale": torch.rand(3, 1), "x_scale": x_scale, "x_zero_point": zero_point}
        want = int8_linear(x, w_q, **args, backend="reference")
        assert torch.equal(int8_linear(x, operand, **args, backend="cpu"), want)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "quick_gelu", "silu"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_activation(activation, dynamic):
    """oneDNN and the kernel approximate erf and tanh to 2**-20 of the input."""
    x_q, w_q, w_scale, bias = codes(7, 130), codes(40, 130), torch.rand(40, 1), torch.randn(40)
    w_scale *= 1e-3
    args = {"activation": activation, "x_scale": torch.rand(7, 1) if dynamic else None}
    y_ref = int8_linear(x_q, w_q, w_scale, bias, **args, backend="reference")
    flat = int8_linear(x_q, w_q, w_scale, bias, x_scale=args["x_scale"], backend="reference")
    for backend in ("triton", "cpu"):
        y = int8_linear(x_q, prepare_int8(w_q, backend), w_scale, bias, **args, backend=backend)
        assert ((y - y_ref).abs() <= 2.0**-20 * (flat.abs() + bias.abs() + 1)).all()


OUT_CODES = [Codes(8), Codes(8, offset=128), Codes(4), Codes(4, offset=8)]


@pytest.mark.parametrize("out", OUT_CODES, ids=str)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_requantized_output(out, activation, assert_codes_agree):
    x_q, w_q, w_scale, bias = codes(9, 197), codes(24, 197), torch.rand(24, 1), torch.randn(24)
    w_scale *= 1e-3
    args = {"activation": activation, "out_codes": out, "out_step": 0.37, "out_zero_point": 3}
    q_ref = int8_linear(x_q, w_q, w_scale, bias, **args, backend="reference")
    assert q_ref.dtype == out.dtype and q_ref.min() >= out.qmin and q_ref.max() <= out.qmax
    q = int8_linear(x_q, w_q, w_scale, bias, **args, backend="triton")
    assert torch.equal(q, q_ref)
    exact, tolerance = exact_value(x_q, w_q, w_scale, bias)
    exact = exact.clamp(min=0) if activation else exact
    q = int8_linear(x_q, prepare_int8(w_q, "cpu"), w_scale, bias, **args, backend="cpu")
    assert_codes_agree(q, q_ref, exact / 0.37, tolerance / 0.37 + 4 * ULP * (exact / 0.37).abs())


@pytest.mark.parametrize("backend", ["triton", "cpu", "reference"])
def test_requantizing_ties_go_to_even(backend):
    w_q = prepare_int8(torch.ones(1, 1, dtype=torch.int8), backend)
    x_q = torch.tensor([[1], [3], [5], [-1], [-3]], dtype=torch.int8)
    out = {"out_codes": Codes(8), "out_step": 2.0, "out_zero_point": 2}
    q = int8_linear(x_q, w_q, torch.ones(1, 1), **out, backend=backend)
    assert q.flatten().tolist() == [2, 4, 4, 2, 0]


@pytest.mark.parametrize("backend", ["triton", "cpu", "reference"])
@pytest.mark.parametrize("groups", [1, 3])
def test_folded_zero_point_equals_a_subtracted_one(groups, backend):
    x_q, w_q, bias = codes(4, 96, dtype=torch.uint8), codes(8, 96), torch.randn(8)
    w_scale, size = torch.rand(8, groups), 32 if groups > 1 else None
    folded = fold_zero_point(bias, w_q, w_scale, 0.02, 117, size)
    operand = prepare_int8(w_q, backend)
    y = int8_linear(x_q, operand, w_scale * 0.02, folded, group_size=size, backend=backend)
    want, _ = exact_value(x_q, w_q, w_scale * 0.02, bias, x_zero_point=117, group_size=size)
    unfolded = (w_q.float().abs() @ torch.full((96,), 255.0)) * w_scale.amax(1) * 0.02
    assert ((y - want).abs() <= 16 * ULP * (unfolded + bias.abs())).all()


@pytest.mark.parametrize("group_size", [None, 128])
def test_many_tokens_take_large_tiles(group_size, monkeypatch):
    monkeypatch.setattr(_launch, "SMS", 0)
    x_q, w_q, bias = codes(130, 256), codes(140, 256), torch.randn(140)
    args = {"x_scale": torch.rand(130, 1), "group_size": group_size}
    w_scale = torch.rand(140, 2 if group_size else 1)
    y = int8_linear(x_q, w_q, w_scale, bias, **args, backend="triton")
    want = int8_linear(x_q, w_q, w_scale, bias, **args, backend="reference")
    if group_size is None:
        assert torch.equal(y, want)
    # a group's part is rounded in another order
    parts = x_q.float().abs() * args["x_scale"] @ w_q.float().abs().T * w_scale.amax(1)
    assert ((y - want).abs() <= 10 * ULP * (parts + bias.abs())).all()


def test_largest_products_do_not_overflow():
    x_q = torch.full((1, 1025), -128, dtype=torch.int8)
    w_q = torch.full((2, 1025), -128, dtype=torch.int8)
    for backend in ("triton", "cpu", "reference"):
        y = int8_linear(x_q, prepare_int8(w_q, backend), torch.ones(2, 1), backend=backend)
        assert y.tolist() == [[1025.0 * 2**14] * 2]


@pytest.mark.parametrize("backend", ["triton", "cpu", "reference"])
def test_leading_dimensions_strides_and_out_dtype(backend):
    x_q, w_q, w_scale = codes(2, 3, 64), codes(8, 64), torch.rand(8, 1) * 1e-2
    operand = prepare_int8(w_q, backend)
    want = int8_linear(x_q, operand, w_scale, backend=backend)
    wide = torch.cat([x_q, x_q], -1)[..., :64]
    swapped = x_q.transpose(0, 1).contiguous().transpose(0, 1)
    for x in (wide, swapped):
        assert torch.equal(int8_linear(x, operand, w_scale, backend=backend), want)
    y = int8_linear(x_q, operand, w_scale, out_dtype=torch.float16, backend=backend)
    assert torch.equal(y, want.half()) and y.shape == (2, 3, 8)
    x_scale = torch.rand(2, 3, 1)
    y = int8_linear(x_q, operand, w_scale, x_scale=x_scale, backend=backend)
    assert torch.allclose(y, want * x_scale)


@pytest.mark.parametrize("backend", ["triton", "cpu", "reference"])
def test_empty_batch(backend):
    operand = prepare_int8(codes(8, 16), backend)
    for x_scale in (None, torch.ones(0, 1)):
        y = int8_linear(
            codes(0, 16), operand, torch.ones(8, 1), torch.ones(8), x_scale=x_scale, backend=backend
        )
        assert y.shape == (0, 8) and y.dtype == torch.float32


@pytest.mark.parametrize("shape", [(24, 197), (1, 1), (64, 64)], ids=str)
def test_restoring_inverts_preparing(shape):
    w_q = codes(*shape)
    for backend in ("triton", "cpu", "reference"):
        assert torch.equal(restore_int8(prepare_int8(w_q, backend)), w_q)


def test_kernel_names():
    w_q = codes(8, 16)
    assert int8_linear_kernel_name(w_q, backend="reference") == "reference"
    assert int8_linear_kernel_name(w_q, backend="triton") == "triton int8_linear"
    operand = prepare_int8(w_q, "cpu")
    if operand.is_mkldnn:
        assert int8_linear_kernel_name(operand) == "onednn.qlinear_pointwise"


def test_errors_say_what_was_expected():
    w_q, one = codes(8, 16), torch.ones(8, 1)
    with pytest.raises(ValueError, match=r"operand must be \[8, 17\] .* got \[8, 16\]"):
        int8_linear(codes(2, 17), w_q, one)
    with pytest.raises(ValueError, match=r"x_q must be int8 or uint8, got torch.float32"):
        int8_linear(torch.zeros(2, 16), w_q, one, backend="reference")
    with pytest.raises(ValueError, match=r"4 groups over 16 channels need group_size .* got None"):
        int8_linear(codes(2, 16), w_q, torch.ones(8, 4), backend="reference")
    with pytest.raises(ValueError, match=r"weights must be int8 \[N, K\], got torch.float32"):
        prepare_int8(torch.zeros(8, 16))
    for backend in ("reference", "triton", "cpu"):
        with pytest.raises(ValueError, match="out_step and out_zero_point go with out_codes"):
            int8_linear(codes(2, 16), w_q, one, out_step=0.5, backend=backend)
        with pytest.raises(ValueError, match="out_codes must be static and not packed"):
            int8_linear(codes(2, 16), w_q, one, out_codes=Codes(8, "token"), backend=backend)


@pytest.mark.parametrize("int8", ["1", "0"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(monkeypatch, int8, dynamic):
    monkeypatch.setenv("QTK_CPU_INT8", int8)
    torch.compiler.reset()
    x_q, w_q, w_scale, bias = codes(4, 32), codes(8, 32), torch.rand(8, 1), torch.randn(8)
    operand, x_scale = prepare_int8(w_q, "cpu"), torch.rand(4, 1) if dynamic else None

    def run(x_q, operand):
        return int8_linear(x_q, operand, w_scale, bias, x_scale=x_scale, activation="gelu")

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x_q, operand), run(x_q, operand))


@pytest.mark.parametrize("backend", ["triton", "cpu", "reference"])
def test_bias_and_scale_may_have_any_strides(backend):
    x_q, w_q = codes(5, 64), codes(24, 64)
    for strided in (lambda: torch.rand(1).expand(24), lambda: torch.rand(48)[::2]):
        bias, w_scale = strided(), strided()[:, None]
        want = int8_linear(x_q, w_q, w_scale.clone(), bias.clone(), backend="reference")
        got = int8_linear(x_q, prepare_int8(w_q, backend), w_scale, bias, backend=backend)
        # product and sum are rounded once each, or together
        rounding = torch.finfo(torch.float32).eps * (2 * want.abs() + bias.abs())
        assert ((got - want).abs() <= rounding).all()


def test_sums_that_would_wrap_around_are_refused():
    x_q, w_q = (torch.empty(1, 131072, dtype=torch.int8) for _ in range(2))
    with pytest.raises(ValueError, match=r"131072 channels .* do not fit into int32"):
        int8_linear(x_q, w_q, torch.ones(1, 1), backend="triton")
    with pytest.raises(ValueError, match="zero point -255 do not fit into int32"):
        int8_linear(
            x_q[:, :65536].view(torch.uint8), w_q[:, :65536], torch.ones(1, 1), x_zero_point=-127,
            backend="triton",
        )  # fmt: skip
