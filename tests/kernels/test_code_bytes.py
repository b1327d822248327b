"""The arithmetic of `_code_bytes.py`, which a GPU does in instructions the interpreter lacks."""

import pytest
import torch

from qtk_kernels._code_bytes import _bytes_ptx, _nibbles_ptx

BOUNDARIES = torch.arange(-140, 140, dtype=torch.float32) + 0.5
VALUES = torch.cat([
    BOUNDARIES, BOUNDARIES.nextafter(torch.tensor(1e9)), BOUNDARIES.nextafter(torch.tensor(-1e9)),
    torch.randn(10000) * 100, torch.tensor([0.0, -0.0, 1e-30, -1e-30, 3e38, -3e38]),
    torch.tensor([float("inf"), -float("inf"), 2.0**24, -(2.0**24), 12582912.0, -12582913.0]),
])  # fmt: skip


def multiply_add(y, lift):
    """fma(y, 2**-149, lift * 2**-149): float64 holds the sum exactly enough to round it once."""
    exact = y.double() * 2.0**-149 + lift * 2.0**-149
    return exact.float().view(torch.int32)


@pytest.mark.parametrize("lift, low, high", [(128, 0, 255), (0, 0, 255), (130, 0, 255), (8, 0, 15)])
def test_subnormals_round_to_nearest_even_and_saturate(lift, low, high):
    got = multiply_add(VALUES, lift).clamp(low, high) - lift
    want = VALUES.round().clamp(low - lift, high - lift)
    assert torch.equal(got, want.int())


def test_ptx_packs_the_first_value_lowest():
    assert "cvt.pack.sat.u8.s32.b32 t, d, c, 0; cvt.pack.sat.u8.s32.b32 t, b, a, t;" in _bytes_ptx(
        128, 128
    )
    assert "0f00000080" in _bytes_ptx(128, 128) and "0x80808080" in _bytes_ptx(128, 128)
    assert _nibbles_ptx(8).index("t, h, d, t") < _nibbles_ptx(8).index("t, e, a, t")
