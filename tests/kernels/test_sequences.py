"""Attention on sentences one after the other: the bits of padded ones with a mask."""

import pytest
import torch

from qtk_kernels.quantized_attention import quantized_attention
from tests.gpu.attention import sentences, step_of

H, D, T = 2, 16, 40
SPANS = [(0, 5), (7, 8), (0, 0), (33, 40)]  # of their places; the fourth has no token
KINDS = [
    ("float", {"softmax": "float"}),
    ("int8", {"softmax": "uniform", "bits": 8}),
    ("int8", {"softmax": "matthew", "bits": 6}),
    ("int8", {"softmax": "code", "steps": 4}),
    ("int4", {"softmax": "code", "steps": 1, "grid": True}),
    ("fp8", {"softmax": "log2", "bits": 4}),
]


@pytest.mark.parametrize("operand, kind, block_n, causal", [
    (*KINDS[0], 16, False), (*KINDS[1], None, False), (*KINDS[2], 16, True),
    (*KINDS[3], None, True), (*KINDS[4], 16, False), (*KINDS[5], None, False),
], ids=str)  # fmt: skip
def test_the_bits_of_padded_sentences(operand, kind, block_n, causal):
    (args, options), (packed, its), rows = sentences(SPANS, T, H, D, operand, causal)
    kind = {**kind, **step_of(kind["softmax"], H), "block_n": block_n}
    want = quantized_attention(*args, **options, **kind, backend="triton").flatten(0, 1)[rows]
    got = quantized_attention(*packed, **its, **kind, backend="triton")
    assert got.shape == (1, len(rows), H * D)
    assert torch.equal(got[0], want)


@pytest.mark.parametrize("operand, kind", KINDS, ids=str)
def test_the_definition_is_that_of_padded_sentences(operand, kind):
    (args, options), (packed, its), rows = sentences(SPANS, T, H, D, operand, True)
    kind = {**kind, **step_of(kind["softmax"], H)}
    want = quantized_attention(*args, **options, **kind, backend="reference").flatten(0, 1)[rows]
    assert torch.equal(quantized_attention(*packed, **its, **kind, backend="reference")[0], want)


def test_what_does_not_fit_is_refused():
    q = torch.zeros(1, 1, 3, 8)
    starts = torch.tensor([[0, 0, 3]], dtype=torch.int32)
    with pytest.raises(ValueError, match="sequences and longest go together"):
        quantized_attention(q, q, q, sequences=starts)
    with pytest.raises(ValueError, match=r"int32 \[S, 3\], got torch.int64 \[1, 3\]"):
        quantized_attention(q, q, q, sequences=starts.long(), longest=3)
    with pytest.raises(ValueError, match=r"without a mask, got .* and a mask"):
        mask = torch.ones(3, dtype=torch.bool)
        quantized_attention(q, q, q, sequences=starts, longest=3, mask=mask)
    with pytest.raises(ValueError, match=r"of \[1, H, N, D\]"):
        quantized_attention(*(torch.zeros(2, 1, 3, 8),) * 3, sequences=starts, longest=3)
