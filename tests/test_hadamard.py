import pytest
import torch

from qtk_kernels.hadamard import PALEY, orthogonal, rotate, split


@pytest.mark.parametrize("n", [1, 2, 64, 12, 24, 20, 28, 36, 44, 60, 68, 76, 768])
def test_hadamard_matrices_are_orthogonal_and_flat(n):
    H = orthogonal(n).double()
    assert torch.allclose(H @ H.T, torch.eye(n, dtype=torch.double), atol=1e-6)
    assert torch.allclose(H.abs(), torch.full_like(H, n**-0.5))


@pytest.mark.parametrize("order", PALEY)
def test_every_paley_order_is_one(order):
    assert split(order)[0] == 1


@pytest.mark.parametrize("K", [1, 5, 7, 12, 32, 96, 192, 197, 384, 768, 1536, 2560, 7168, 3 * 7])
def test_a_rotation_keeps_lengths_and_can_be_undone(K):
    blocks, f, p = split(K)
    assert blocks * f * p == K
    x = torch.randn(3, 2, K)
    y = rotate(x)
    assert torch.allclose(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-4)
    assert torch.allclose(rotate(y, inverse=True), x, atol=1e-5)


@pytest.mark.parametrize("K", [192, 384, 768, 1024, 3072, 4096])
def test_model_widths_mix_all_channels(K):
    spread = rotate(torch.eye(K)[:1]).abs()
    assert torch.allclose(spread, torch.full_like(spread, K**-0.5))
