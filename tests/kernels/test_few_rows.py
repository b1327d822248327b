import pytest
import torch

from qtk_kernels.few_rows import few_rows_group, few_rows_linear, prepare_few_rows

HALF = 2.0**-9  # half an ulp of bfloat16, relative


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("M, N, K, group_size", [
    (1, 16, 32, None), (5, 48, 256, 64), (3, 384, 1536, 128), (2, 64, 384, None),
])  # fmt: skip
def test_product(M, N, K, group_size, dtype, asymmetric):
    G = K // group_size if group_size else 1
    w_q = torch.randint(-8, 8, (N, K), dtype=torch.int8)
    w_scale, bias, x = torch.rand(N, G) + 0.1, torch.randn(N), torch.randn(M, K).to(dtype)
    zero_point = torch.randint(-8, 8, (N, G)).float() if asymmetric else None
    size = few_rows_group((N, K), G, group_size)
    if size is None:
        pytest.skip("needs a CPU with vector instructions")
    operand = prepare_few_rows(w_q, w_scale, zero_point, size)
    y = few_rows_linear(x, operand, bias)
    step = w_scale.double().repeat_interleave(K // G, 1)
    behind = 0 if zero_point is None else zero_point.double().repeat_interleave(K // G, 1) * step
    exact = x.double() @ (w_q * step - behind).T + bias
    # a code's share and a zero point's are rounded apart: their magnitudes do not cancel
    magnitude = x.double().abs() @ ((w_q * step).abs() + abs(behind)).T
    # x, the scale and their product with a code are rounded, then the sum, then the bias's sum
    bound = 3.1 * HALF * magnitude + HALF * exact.abs() + HALF * (exact.abs() + bias.abs())
    assert y.dtype == dtype and ((y - exact).abs() <= bound).all()


@pytest.mark.parametrize("N, K, group_size", [(7, 32, None), (16, 48, None), (16, 64, 16)])
def test_shapes_that_the_kernel_does_not_know(N, K, group_size):
    assert few_rows_group((N, K), K // group_size if group_size else 1, group_size) is None
