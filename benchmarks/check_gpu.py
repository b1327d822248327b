"""Every kernel against its reference, at random odd shapes, dtypes and layouts.

    python -m benchmarks.check_gpu [cases] [--only OP] [--minutes 9]    on a CPU: interpreted

`cases` of each op. Outputs are poisoned before a kernel runs, so that what it does not write is
seen; on a GPU every case runs twice, and must give the same bits. The bounds are those of the
tests: equal codes but next to a rounding boundary, and K float32 roundings.
"""

import argparse
import os
import random
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from benchmarks import check_attention
from qtk_kernels.codes import Codes
from qtk_kernels.fp8_linear import fp8_linear, to_fp8
from qtk_kernels.hadamard_quantize import hadamard_quantize
from qtk_kernels.int4_linear import int4_linear
from qtk_kernels.int8_linear import int8_linear
from qtk_kernels.layer_norm_quantize import layer_norm_quantize
from qtk_kernels.packing import pack_int4, unpack_int4
from qtk_kernels.shift_scale_quantize import shift_scale_quantize
from qtk_kernels.weight_only_linear import weight_only_linear

ULP = 2.0**-24
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# on a GPU some that take several programs, the largest tiles, and sums split among programs
SIZES = (1, 2, 3, 7, 16, 31, 33, 64, 65, 100, 129, 197, 256, 300, 1030)
WIDTHS = (*SIZES, 384, 768, 1025, 4096, 5000)
LARGE = ((4097, 4100, 1025), (2048, 1536, 768), (8200, 2056, 128))
LAYOUTS = ("dense", "wide rows", "columns", "unaligned")
if not torch.cuda.is_available():  # the interpreter takes a second for each tile
    SIZES = (1, 2, 3, 7, 16, 17, 31, 33, 48, 65)  # type: ignore[assignment]
    WIDTHS = (*SIZES, 100, 129, 197, 256, 300)  # type: ignore[assignment]
    LARGE = ()  # type: ignore[assignment]
FEW = SIZES[:8] if torch.cuda.is_available() else (1, 2, 3, 5)  # rows of a quantizer


@contextmanager
def poisoned() -> Any:
    """`torch.empty` returns garbage that no op writes by chance."""
    empty = torch.empty

    def poison(*args: Any, **kwargs: Any) -> Tensor:
        out = empty(*args, **kwargs)
        return out.fill_(77) if out.numel() else out

    torch.empty = poison  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.empty = empty


def both(op: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, Any]:
    """What the kernel gives into poisoned memory, and the reference."""
    with poisoned():
        got = op(*args, **options, backend="triton")
        if torch.cuda.is_available():
            same(got, op(*args, **options, backend="triton"))
    return got, op(*args, **options, backend="reference")


def same(first: Any, second: Any) -> None:
    """Two runs of a kernel differ in no bit."""
    pairs = zip(*(r if isinstance(r, tuple) else (r,) for r in (first, second)), strict=True)
    for a, b in pairs:
        assert a is b is None or torch.equal(a.view(torch.uint8), b.view(torch.uint8)), (
            "two runs of the same call differ"
        )


def sizes(rng: random.Random) -> tuple[int, int, int]:
    """M, N and K."""
    if LARGE and rng.random() < 0.1:
        return rng.choice(LARGE)
    return rng.choice(SIZES), rng.choice(SIZES), rng.choice(WIDTHS)


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


def largest_term(op: str, x: Tensor, a: Tensor, b: Tensor) -> float:
    """The largest of the summands that a quantizer adds up to one value."""
    x = x.double()
    if op == "layer_norm":  # of x + x: the residual is x itself
        x = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-5)
    size = float((x.abs() * a + b.abs()).max())
    return size * len(a) ** 0.5 if op == "hadamard" else size


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
    widest = (w_q.abs().double() + (0 if zero is None else zero.abs().amax(1, keepdim=True))).mul(
        w_scale.amax(1, keepdim=True)
    )
    magnitude = x.double().abs() @ widest.T + bias.abs()
    rounding = 2 * torch.finfo(dtype).eps * want.double().abs()
    near(got, want, rounding + 2 * (K + 8) * ULP * magnitude)


def laid_out(x: Tensor, rng: random.Random) -> Tensor:
    """The same values [M, K] in one of LAYOUTS."""
    layout = rng.choice(LAYOUTS)
    if layout == "wide rows":
        return torch.cat([x, x], -1)[:, : x.shape[1]]
    if layout == "columns":
        return x.T.contiguous().T
    if layout == "unaligned":  # a pointer that is a multiple of nothing
        flat = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
        flat[1:] = x.flatten()
        return flat[1:].view(x.shape)
    return x


def near(got: Tensor, want: Tensor, tolerance: Tensor) -> None:
    worst = ((got.double() - want.double()).abs() - tolerance).max()
    assert worst <= 0, f"{worst:.3g} beyond the bound"


QUANTIZERS = ("shift_scale", "activation", "layer_norm", "hadamard")
CHECKS: dict[str, Callable[[random.Random, str], None]] = {
    **{op: partial(quantizer, op) for op in QUANTIZERS},
    **{op: partial(integer_linear, op) for op in ("W8A8", "W4A8", "W4A4")},
    "fp8": fp8,
    "weight_only": weight_only,
    "attention": check_attention.attention,
}


def check(name: str, seed: int, device: str) -> None:
    """One random case of an op."""
    torch.manual_seed(seed)
    CHECKS[name](random.Random(seed), device)


def runnable(device: str) -> list[str]:
    """The ops that this device has instructions for."""
    old = device == "cuda" and torch.cuda.get_device_capability() < (8, 9)
    return [name for name in CHECKS if not (old and name == "fp8")]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("cases", type=int, nargs="?", default=100)
    parser.add_argument("--only", choices=list(CHECKS))
    parser.add_argument("--minutes", type=float, default=9.0)
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    end, failed = time.monotonic() + 60 * options.minutes, 0
    done = dict.fromkeys([options.only] if options.only else runnable(device), 0)
    for seed in range(options.cases):  # all ops keep pace, so that time cuts none of them off
        for name in done:
            if time.monotonic() > end:
                break
            done[name] += 1
            try:
                check(name, seed, device)
            except Exception as error:  # a kernel that does not compile is a finding, too
                failed += 1
                print(f"{name}, seed {seed}: {type(error).__name__}: {error}", flush=True)
    for name, cases in done.items():
        print(f"{name}: {cases} random cases" + (", out of time" * (cases < options.cases)))
    print(f"{failed} of {sum(done.values())} disagree with the reference on {device}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
