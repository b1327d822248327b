import pytest
import torch

from qtk_kernels.heads_quantize import heads_quantize


def views(B, T, H, D, dtype):
    """q, k and v of one joined product."""
    return torch.randn(B, T, 3, H, D).to(dtype).permute(2, 0, 3, 1, 4)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 5, 3, 20), (1, 33, 2, 64), (2, 16, 1, 130)],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("bits, transposed, dtype", [
    (8, False, torch.float32), (4, True, torch.float16), (8, True, torch.bfloat16),
], ids=str)  # fmt: skip
def test_codes_and_scales_are_the_definition_s(shape, bits, transposed, dtype):
    q, k, v = views(*shape, dtype)
    multiplier = torch.rand(shape[2], shape[3]) * 60
    got, want = (
        heads_quantize(q, k, v, multiplier, bits, transposed=transposed, backend=backend)
        for backend in ("triton", "reference")
    )
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    side_by_side = transposed and shape[1] % 16 == 0
    assert (got.v.stride(2) == 1 < got.v.stride(3)) == side_by_side


def test_few_queries_of_many_keys():
    """As with a cache."""
    q, k, v = (torch.randn(2, 3, T, 16) for T in (1, 40, 40))
    args = (q, k.transpose(2, 3).contiguous().transpose(2, 3), v, torch.rand(3, 16), 8)
    for a, b in zip(heads_quantize(*args, backend="triton"),
                    heads_quantize(*args, backend="reference"), strict=True):  # fmt: skip
        assert torch.equal(a, b)


def test_a_broken_token_is_seen_in_its_scale_and_zeros_have_one():
    q = torch.zeros(1, 1, 3, 8)
    q[0, 0, 1, 2] = float("nan")
    for backend in ("triton", "reference"):
        found = heads_quantize(q, q, q * 0, torch.ones(1, 8), 8, backend=backend)
        assert found.q_scale.isnan().tolist() == [[[False, True, False]]]
        assert found.q_scale[0, 0, 0] > 0 and (found.q[0, 0, 0] == 0).all()


def test_no_tokens():
    q = torch.zeros(2, 3, 0, 8)
    found = heads_quantize(q, q, q, torch.ones(3, 8), 8, backend="triton")
    assert found.v.shape == q.shape and found.k_scale.shape == (2, 3, 0)


def test_shapes_that_do_not_fit_are_refused():
    q, k = torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 4, 8)
    with pytest.raises(ValueError, match=r"v_multiplier must be \[2, 8\], got \[8\]"):
        heads_quantize(q, k, k, torch.ones(8), 8)
    with pytest.raises(ValueError, match=r"k and v \[B, H, Tk, D\], got"):
        heads_quantize(q, k, q, torch.ones(2, 8), 8)
    with pytest.raises(ValueError, match="got 3, 4, 4 axes"):
        heads_quantize(q[0], k, k, torch.ones(2, 8), 8)
