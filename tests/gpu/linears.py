"""Random cases of the matrix products."""

import random
from typing import Any

import torch

from qtk_kernels.codes import Codes
from qtk_kernels.fp8_linear import fp8_linear, to_fp8
from qtk_kernels.int4_linear import int4_linear
from qtk_kernels.int8_linear import int8_linear
from qtk_kernels.packing import pack_int4
from qtk_kernels.weight_only_linear import weight_only_linear
from tests.gpu.cases import DTYPES, laid_out, sizes
from tests.gpu.compare import ULP, both, near


def integer_linear(op: str, rng: random.Random, device: str) -> None:
    """One group gives equal bits; several add their parts in another order."""
    M, N, K = sizes(rng)
    top = 128 if op == "W8A8" else 8
    w_q = torch.randint(-top, top, (N, K), dtype=torch.int8, device=device)
    unsigned = op != "W4A4" and rng.random() < 0.4
    top = 8 if op == "W4A4" else 128
    x_q = torch.randint(-top, top, (M, K), dtype=torch.int8, device=device)
    size = rng.choice([None, 32, 64, 128, rng.randint(1, K)])
    G = 1 if size is None else -(-K // size)
    args: dict[str, Any] = {
        "x_scale": torch.rand(M, rng.choice([1, G]), device=device) if rng.random() < 0.6 else None,
        "x_zero_point": rng.choice([0, 3, -100]), "group_size": size,
    }  # fmt: skip
    if G == 1 and rng.random() < 0.3:
        args |= {"out_step": 0.5, "out_zero_point": 3, "out_codes": Codes(rng.choice([4, 8]))}
    w_scale, bias = torch.rand(N, G, device=device) * 1e-2, torch.randn(N, device=device)
    x = x_q.view(torch.uint8) if unsigned else x_q
    if op == "W8A8":
        got, want = both(int8_linear, laid_out(x, rng), w_q, w_scale, bias, **args)
    else:
        packed = op == "W4A4"
        x = pack_int4(x_q) if packed else laid_out(x, rng)
        args |= {"in_features": K, "x_packed": packed}
        got, want = both(int4_linear, x, pack_int4(w_q), w_scale, bias, **args)
    if G == 1:
        assert torch.equal(got, want), (op, M, N, K, args)
        return
    codes = x_q.view(torch.uint8) if unsigned else x_q
    part = (codes.double() - args["x_zero_point"]).abs() @ w_q.double().abs().T
    scale = 1.0 if args["x_scale"] is None else args["x_scale"].amax(1, keepdim=True)
    near(got, want, (2 * G + 16) * ULP * (part * scale * w_scale.amax(1) + bias.abs()))


def fp8(rng: random.Random, device: str) -> None:
    """The 14 bits that a tensor core adds with, and a few roundings."""
    M, N, K = sizes(rng)
    x, w = torch.randn(M, K, device=device), torch.randn(N, K, device=device)
    bias, (x_q, x_scale), (w_8, w_scale) = torch.randn(N, device=device), to_fp8(x), to_fp8(w)
    token = rng.random() < 0.7
    got, want = both(
        fp8_linear, laid_out(x_q, rng), w_8, w_scale, bias, x_scale=x_scale if token else None,
        out_dtype=rng.choice(DTYPES[1:]) if rng.random() < 0.3 else torch.float32,
    )  # fmt: skip
    magnitude = x_q.double().abs() @ (w_8.double() * w_scale).abs().T
    magnitude = magnitude * x_scale if token else magnitude
    lost = 2.0**-13 if device == "cuda" else K * ULP
    rounding = torch.finfo(got.dtype).eps * want.double().abs()
    near(got, want, rounding + (lost + 8 * ULP) * magnitude + 8 * ULP * bias.abs())


def weight_only(rng: random.Random, device: str) -> None:
    """K float32 roundings, and one of the result."""
    M, N, K = sizes(rng)
    bias, bits, dtype = torch.randn(N, device=device), rng.choice([3, 4, 8]), rng.choice(DTYPES)
    x = laid_out(torch.randn(M, K, device=device).to(dtype), rng)
    top = 2 ** (bits - 1)
    w_q = torch.randint(-top, top, (N, K), dtype=torch.int8, device=device)
    size = rng.choice([None, 32, 64, 128, rng.randint(1, K)])
    G = 1 if size is None else -(-K // size)
    w_scale = torch.rand(N, G, device=device) * 0.1
    zero = torch.randn(N, G, device=device) if rng.random() < 0.5 else None
    got, want = both(
        weight_only_linear, x, pack_int4(w_q) if bits <= 4 else w_q, w_scale, bias,
        w_zero_point=zero, bits=bits, in_features=K, group_size=size,
    )  # fmt: skip
    widest = (w_q.double().abs() + (0 if zero is None else zero.abs().amax(1, keepdim=True))).mul(
        w_scale.amax(1, keepdim=True)
    )
    magnitude = x.double().abs() @ widest.T + bias.abs()
    rounding = 2 * torch.finfo(dtype).eps * want.double().abs()
    near(got, want, rounding + 2 * (K + 8) * ULP * magnitude)
