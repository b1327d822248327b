"""Random cases of the row kernels."""

import random
from typing import Any

import torch
from torch import Tensor

from qtk_kernels.codes import Codes
from qtk_kernels.hadamard_quantize import hadamard_quantize
from qtk_kernels.heads_quantize import heads_quantize
from qtk_kernels.layer_norm_quantize import layer_norm_quantize
from qtk_kernels.packing import unpack_int4
from qtk_kernels.shift_scale_quantize import shift_scale_quantize
from tests.gpu import cases
from tests.gpu.cases import DTYPES, FEW, WIDTHS, laid_out
from tests.gpu.compare import ULP, both, near

QUANTIZERS = ("shift_scale", "activation", "layer_norm", "hadamard")


def quantizer(op: str, rng: random.Random, device: str) -> None:
    """Codes differ by one at most, and only in one of a thousand; scales by a few roundings."""
    K, M = rng.choice(WIDTHS), rng.choice(FEW)
    x = laid_out((torch.randn(M, K, device=device) * 4).to(rng.choice(DTYPES)), rng)
    a, b = torch.rand(K, device=device) * 10, torch.randn(K, device=device)
    packed = rng.random() < 0.3
    grids: list[str | int] = ["tensor", "token", 32, 128, rng.randint(1, K)]
    bits = rng.randint(2, 4 if packed else 8)
    offset = 2 ** (bits - 1) if not packed and rng.random() < 0.5 else 0
    wanted = Codes(bits, rng.choice(grids), offset, packed)
    options: dict[str, Any] = {}
    if op == "shift_scale":
        got, want = both(shift_scale_quantize, x, a, b, wanted)
    elif op == "activation":
        options["activation"] = rng.choice(["gelu", "gelu_tanh", "relu"])
        got, want = both(shift_scale_quantize, x, a, b, wanted, **options)
    elif op == "hadamard":
        divisors = [d for d in range(1, K + 1) if K % d == 0]
        options["block"] = rng.choice(divisors)
        got, want = both(hadamard_quantize, x, a, b, wanted, **options)
    else:
        emit = rng.choice([None, "sum", "norm"])
        norm = {"norm_weight": a, "norm_bias": b} if emit == "norm" else {}
        got, want = both(layer_norm_quantize, x, a, b, 1e-5, wanted, residual=x, emit=emit, **norm)
        if emit:
            eps = torch.finfo(x.dtype).eps
            near(got[2], want[2], (2 * eps + K * ULP) * want[2].abs() + (K + 8) * ULP * 40)
    codes = [unpack_int4(q, K) if packed else q for q in (got[0], want[0])]
    differ = (codes[0].int() - codes[1].int()).abs()
    assert differ.max() <= 1, f"{op} {wanted} {options}: codes differ by {differ.max()}"
    exact = op == "shift_scale"
    share = differ.float().mean()
    few = not differ.any() if exact else share <= max(2e-3, 2 / differ.numel())
    assert few, (op, wanted, options)
    if want[1] is not None:  # a group's values may be small differences of large terms
        top = 2 ** (bits - 1) - 1
        terms = 0 if exact else largest_term(op, x, a, b) / max(top, 1)
        near(got[1], want[1], (K + 8) * 4 * ULP * (0 if exact else 1) * (want[1] + terms))


def heads(rng: random.Random, device: str) -> None:
    """q, k and v of one product, with a cache's keys, or dense: equal bits."""
    B, H, D = rng.choice([1, 2]), rng.choice([1, 2, 3]), rng.choice(cases.HEADS)
    T, dtype = rng.choice([1, 2, 16, 33, 64, rng.randint(1, cases.LONGEST)]), rng.choice(DTYPES)
    joined = (torch.randn(B, T, 3, H, D, device=device) * 4).to(dtype)
    q, k, v = joined.permute(2, 0, 3, 1, 4)
    layout = rng.choice(["joined", "cache", "dense", "channels apart"])
    if layout == "cache":
        q, k, v = q[:, :, -1:], k.contiguous(), v.contiguous()
    elif layout == "dense":
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    elif layout == "channels apart":
        k = k.transpose(2, 3).contiguous().transpose(2, 3)
    multiplier = torch.rand(H, D, device=device) * 40
    got, want = both(
        heads_quantize, q, k, v, multiplier, rng.randint(2, 8), transposed=rng.random() < 0.5
    )
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b), (B, H, T, D, dtype, layout)


def largest_term(op: str, x: Tensor, a: Tensor, b: Tensor) -> float:
    """The largest of the summands that a quantizer adds up to one value."""
    x = x.double()
    if op == "layer_norm":  # of x + x: the residual is x itself
        x = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-5)
    size = float((x.abs() * a + b.abs()).max())
    return size * len(a) ** 0.5 if op == "hadamard" else size
