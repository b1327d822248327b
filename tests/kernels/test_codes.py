"""`Codes`: one value that says what codes a quantizer writes."""

import pickle
import subprocess
import sys
from copy import deepcopy

import pytest
import torch

from qtk_kernels.codes import Codes, as_int8, as_uint8

SPECS = [
    Codes(8),
    Codes(4, "token", packed=True, clip=0.9),
    Codes(4, 100, offset=8, clip=0.1),
    Codes(2, 1),
]


@pytest.mark.parametrize("codes", SPECS, ids=str)
def test_numbers_say_all_there_is(codes):
    assert Codes.of(codes.numbers) == codes


@pytest.mark.parametrize("bits", range(2, 9))
def test_an_offset_moves_codes_and_changes_no_range(bits):
    signed, moved = Codes(bits), Codes(bits, offset=2 ** (bits - 1))
    assert (signed.dtype, moved.dtype) == (torch.int8, torch.uint8)
    assert (signed.qmin, signed.qmax) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert (moved.qmin, moved.qmax) == (0, 2**bits - 1)  # it is part of y already
    token = Codes(bits, "token", offset=2 ** (bits - 1))
    assert (token.qmin, token.qmax, token.added) == (signed.qmin, signed.qmax, 2 ** (bits - 1))


def test_equal_codes_have_one_hash_and_copies_keep_it():
    for codes in SPECS:
        hash(codes)  # remembered from here on
        twin = Codes(codes.bits, codes.granularity, codes.offset, codes.packed, codes.clip)
        copies = [twin, deepcopy(codes), pickle.loads(pickle.dumps(codes))]
        assert {codes, *copies} == {codes} and [hash(c) for c in copies] == [hash(codes)] * 3


def test_a_remembered_hash_is_right_in_another_process():
    codes = Codes(8, "token")
    program = (
        f"from qtk_kernels.codes import Codes; print(hash(Codes(8, 'token')) == {hash(codes)})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env={"PYTHONPATH": ":".join(sys.path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "True"


@pytest.mark.parametrize("fields, message", [
    ({"bits": 9}, "bits must be 2 to 8, got 9"),
    ({"bits": 8, "packed": True}, "no offset and at most 4 bits, got offset 0 and 8 bits"),
    ({"bits": 4, "offset": 8, "packed": True}, "no offset and at most 4 bits, got offset 8"),
    ({"bits": 8, "granularity": "row"}, "granularity must be .* got 'row'"),
    ({"bits": 8, "granularity": 0}, "granularity must be .* got 0"),
    ({"bits": 4, "offset": 128}, r"must be 0 \(int8\) or 8 \(uint8\), got 128"),
    ({"bits": 8, "clip": 0}, "clip must be in"),
], ids=str)  # fmt: skip
def test_what_no_kernel_writes_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Codes(**fields)


def test_bytes_change_their_sign_bit_and_nothing_else():
    q = torch.arange(-128, 128).to(torch.int8)
    assert torch.equal(as_uint8(q).int(), q.int() + 128) and as_uint8(q).dtype == torch.uint8
    assert torch.equal(as_int8(as_uint8(q)), q)
    assert as_int8(q) is q and as_uint8(as_uint8(q)).dtype == torch.uint8
