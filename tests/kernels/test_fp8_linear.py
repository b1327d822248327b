import pytest
import torch

from qtk_kernels.fp8_linear import fp8_linear, fp8_linear_kernel_name, to_fp8

ULP = 2.0**-24
SHAPES = [(1, 1, 1), (5, 24, 7), (33, 70, 130), (2, 130, 1025), (3, 16, 2048)]  # M, N, K


def inputs(M, N, K, per_row=True):
    x_q, x_scale = to_fp8(torch.randn(M, K) * 5, per_row=per_row)
    w_q, w_scale = to_fp8(torch.randn(N, K))
    return x_q, w_q, w_scale, torch.randn(N), x_scale if per_row else None


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("backend", ["triton", "cpu", "reference"])
def test_product(shape, per_row, backend):
    """Products are exact; float32 adds K of them in any order."""
    x_q, w_q, w_scale, bias, x_scale = inputs(*shape, per_row=per_row)
    y = fp8_linear(x_q, w_q, w_scale, bias, x_scale=x_scale, backend=backend)
    x = x_q.double() if x_scale is None else x_q.double() * x_scale
    w = w_q.double() * w_scale
    tolerance = (shape[2] + 8) * ULP * (x.abs() @ w.abs().T + bias.abs())
    assert ((y - (x @ w.T + bias)).abs() <= tolerance).all()


def test_rounding_is_that_of_e4m3():
    x = torch.tensor([[448.0, 17.0, 0.3, -1e-9], [0.0, 0.0, 0.0, 0.0]])
    q, scale = to_fp8(x)
    assert scale[0] == 1 and q[0].float().tolist() == [448.0, 16.0, 0.3125, 0.0]
    assert (q[1].float() == 0).all() and scale[1] > 0


@pytest.mark.parametrize("backend", ["triton", "cpu", "reference"])
def test_activation_dtype_strides_and_empty_batch(backend):
    x_q, w_q, w_scale, bias, x_scale = inputs(6, 24, 64)
    args = {"x_scale": x_scale, "backend": backend}
    y = fp8_linear(x_q, w_q, w_scale, bias, **args)
    relu = fp8_linear(x_q, w_q, w_scale, bias, activation="relu", out_dtype=torch.float16, **args)
    assert torch.equal(relu, y.clamp(min=0).half())
    wide = torch.cat([x_q.float(), x_q.float()], -1).to(x_q.dtype)[:, :64]
    assert torch.equal(fp8_linear(wide, w_q, w_scale, bias, **args), y)
    args = {"x_scale": x_scale[:0], "backend": backend}
    assert fp8_linear(x_q[:0], w_q, w_scale, bias, **args).shape == (0, 24)


def test_kernel_names():
    w_q = inputs(1, 8, 16)[1]
    assert fp8_linear_kernel_name(w_q, backend="triton") == "triton fp8_linear"
    assert fp8_linear_kernel_name(w_q) == "float32 linear"


def test_errors_say_what_was_expected():
    x_q, w_q, w_scale, _, x_scale = inputs(2, 8, 16)
    with pytest.raises(ValueError, match=r"codes must be torch.float8_e4m3fn, got torch.float32"):
        fp8_linear(x_q.float(), w_q, w_scale)
    with pytest.raises(ValueError, match=r"operand must be \[8, 16\] .* got \[8, 15\]"):
        fp8_linear(x_q, w_q[:, :15], w_scale)
    with pytest.raises(ValueError, match=r"x_scale must be \[2, 1\], got \[1, 1\]"):
        fp8_linear(x_q, w_q, w_scale, x_scale=x_scale[:1])


def test_compiles_to_one_graph():
    x_q, w_q, w_scale, bias, x_scale = inputs(4, 8, 32)

    def run(x_q):
        return fp8_linear(x_q, w_q, w_scale, bias, x_scale=x_scale, activation="gelu")

    assert torch.equal(torch.compile(run, fullgraph=True, backend="eager")(x_q), run(x_q))
