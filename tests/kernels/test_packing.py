import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtk_kernels.packing import pack_int4, packed_width, unpack_int4


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 3), st.integers(1, 400), st.integers(0, 2**30))
def test_unpacking_inverts_packing(M, K, seed):
    q = torch.randint(-8, 8, (M, 2, K), generator=torch.Generator().manual_seed(seed))
    q = q.to(torch.int8)
    packed = pack_int4(q)
    assert packed.shape == (M, 2, packed_width(K)) and packed.dtype == torch.uint8
    assert torch.equal(unpack_int4(packed, K), q)


def test_byte_holds_channel_j_and_channel_j_plus_64():
    q = torch.zeros(1, 256, dtype=torch.int8)
    q[0, 128 + 5], q[0, 128 + 69] = 3, -2
    packed = pack_int4(q)
    assert packed[0, 64 + 5] == 0xE3 and packed.count_nonzero() == 1


def test_padding_is_zero():
    packed = pack_int4(torch.full((1, 3), -1, dtype=torch.int8))
    assert packed.tolist() == [[15, 15, 15] + [0] * 61]


def test_wrong_width_says_what_was_expected():
    with pytest.raises(ValueError, match=r"uint8 \[\.\.\., 64\], got torch.uint8 \[1, 65\]"):
        unpack_int4(torch.zeros(1, 65, dtype=torch.uint8), 100)
