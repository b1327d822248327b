import pytest
import torch

from qtk_kernels._int4 import unpack_int4
from qtk_kernels.log_softmax_quantize import log_dequantize, log_softmax_quantize

SHAPES = [(1, 1), (3, 7), (2, 3, 197), (5, 130), (2, 1025)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("steps", [1, 2])
def test_kernel_equals_reference(shape, steps, device, assert_codes_agree):
    x = torch.randn(shape, device=device) * 4
    K = shape[-1]
    q, q_ref = (
        unpack_int4(log_softmax_quantize(x, steps=steps, backend=b), K) & 15
        for b in ("triton", "reference")
    )
    exact = -steps * x.double().log_softmax(-1) / torch.log(torch.tensor(2.0).double())
    # exp2, log2 and the sum each to a few ulp of numbers up to 32: |t| times 2**-23 a rounding
    assert_codes_agree(q, q_ref, exact, (x.abs() * 1.5 + 8) * steps * 16 * 2.0**-23)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("steps", [1, 2])
def test_codes_are_rounded_logarithms(steps, backend):
    x = torch.log(torch.tensor([[0.5, 0.25, 0.125, 0.0625, 0.0625]]))
    q = log_softmax_quantize(x, steps=steps, backend=backend)
    assert (unpack_int4(q, 5) & 15).tolist() == [
        [steps, 2 * steps, 3 * steps, 4 * steps, 4 * steps]
    ]
    p = log_dequantize(q, 5, steps=steps, backend=backend)
    assert torch.equal(p, x.exp().mul(64).round() / 64)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_what_is_hidden_has_probability_zero(backend):
    x = torch.tensor([[0.0, float("-inf"), 0.0], [float("-inf")] * 3])
    p = log_dequantize(log_softmax_quantize(x, backend=backend), 3, backend=backend)
    assert p.tolist() == [[0.5, 0, 0.5], [0, 0, 0]]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_inverse_is_the_same_on_every_backend(shape):
    x = torch.randn(shape) * 4
    q = log_softmax_quantize(x, scale=0.5, backend="reference")
    K = shape[-1]
    assert torch.equal(
        log_dequantize(q, K, backend="triton"), log_dequantize(q, K, backend="reference")
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits_and_strides(dtype):
    x = (torch.randn(6, 64).to(dtype)).T.contiguous().T
    for backend in ("triton", "reference"):
        assert torch.equal(
            log_softmax_quantize(x, backend=backend),
            log_softmax_quantize(x.float().contiguous(), backend=backend),
        )


def test_errors_say_what_was_expected():
    with pytest.raises(ValueError, match="steps must be one of"):
        log_softmax_quantize(torch.zeros(1, 4), steps=4)
    with pytest.raises(ValueError, match="scale must be positive"):
        log_softmax_quantize(torch.zeros(1, 4), scale=0)
    with pytest.raises(ValueError, match="up to 8192 scores"):
        log_softmax_quantize(torch.zeros(1, 9000), backend="triton")
    assert log_softmax_quantize(torch.zeros(0, 4)).shape == (0, 64)
