"""Calls of every op as a GPU would see them, for a compiler: tensors are empty, sizes are real.

All options together are 15,000 launches, hours of compiling. A branch of a kernel depends on two
of them at once, seldom on more: every two options meet in some case (`pairwise`), and the random
cases of the GPU checks, others for each card, draw the rest.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations, cycle, product
from typing import Any

import torch
from torch import Tensor

from qtk_kernels import _tma
from qtk_kernels import fp8_linear as fp8_module
from qtk_kernels import int8_linear as int8_module
from qtk_kernels._plan import forget
from qtk_kernels.codes import Codes
from qtk_kernels.fp8_linear import E4M3, fp8_linear
from qtk_kernels.hadamard_quantize import hadamard_quantize
from qtk_kernels.heads_quantize import heads_quantize
from qtk_kernels.int4_linear import int4_linear
from qtk_kernels.int8_linear import int8_linear
from qtk_kernels.layer_norm_quantize import layer_norm_quantize
from qtk_kernels.packing import packed_width
from qtk_kernels.quantized_attention import quantized_attention
from qtk_kernels.shift_scale_quantize import shift_scale_quantize
from qtk_kernels.weight_only_linear import weight_only_linear

ROWS = (1, 2, 3, 16, 17, 64, 197)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((4096, 4096), (768, 3072), (40, 100))  # N and K: split sums, BERT's, neither
GROUPS = (None, 128, 32, 100)
HEADS = (32, 64, 80, 128, 256)
TRITON: dict[str, Any] = {"backend": "triton"}


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        name: says which.
        run: makes the call.
        first: one of those to compile when time is short.
        stack: bytes of a thread's stack that are tolerated: products of float32 tokens and rows
            that do not begin on 16 bytes have some, 20,001 channels too; heads beyond 128 have any.
        waits: tensor cores may wait after each product: with a mask of every query, and where
            heads of floats have more than 64 channels.
        kernel: what has to be among the kernels, where another would serve too.
    """

    name: str
    run: Callable[[], Any]
    first: bool = False
    stack: float = 0
    waits: bool = False
    kernel: str = ""


def pairwise(*axes: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    """Few combinations in which every option of an axis meets every option of every other."""
    numbers = [range(len(axis)) for axis in axes]
    left = {
        ((i, a), (j, b)): None for i, j in combinations(range(len(axes)), 2)
        for a, b in product(numbers[i], numbers[j])
    }  # fmt: skip
    while left:
        chosen = dict(next(iter(left)))
        for i in range(len(axes)):
            if i not in chosen:
                chosen[i] = max(numbers[i], key=lambda a, i=i: sum(
                    (min((i, a), other), max((i, a), other)) in left for other in chosen.items()
                ))  # fmt: skip
        for pair in combinations(sorted(chosen.items()), 2):
            left.pop(pair, None)
        yield tuple(axis[chosen[i]] for i, axis in enumerate(axes))


def empty(*shape: int, dtype: torch.dtype = torch.float32, unaligned: bool = False) -> Tensor:
    """Uninitialized; unaligned: its pointer is a multiple of nothing."""
    flat = torch.empty(int(torch.Size(shape).numel()) + unaligned, dtype=dtype)
    return flat[int(unaligned) :].view(shape)


def i8(*shape: int, unaligned: bool = False) -> Tensor:
    return empty(*shape, dtype=torch.int8, unaligned=unaligned)


def u8(*shape: int, unaligned: bool = False) -> Tensor:
    return empty(*shape, dtype=torch.uint8, unaligned=unaligned)


def quantizers() -> Iterator[Case]:
    """Row kernels."""
    widths = (1, 2, 3, 16, 100, 128, 768, 1025, 4096, 20001)
    grids = (Codes(8), Codes(8, "token"), Codes(4, "token", packed=True), Codes(8, "token", 128),
             Codes(4, 128, packed=True), Codes(8, 100), Codes(4, 20, packed=True))  # fmt: skip
    turns = zip(cycle(ROWS), cycle(FLOATS), cycle((None, "gelu", "gelu_tanh", "relu", None)),
                cycle((None, "sum", "norm", "sum")), strict=False)  # fmt: skip
    for (K, codes), (M, dtype, activation, emit) in zip(
        product(widths, grids), turns, strict=False
    ):
        x, v = empty(M, K, dtype=dtype, unaligned=K == 100), empty(K)
        name = f"{M}x{K} {dtype} {codes}"
        yield Case(
            f"shift_scale {activation} {name}",
            lambda x=x, v=v, c=codes, a=activation: shift_scale_quantize(
                x, v if a else None, v, c, activation=a, **TRITON
            ), first=M == 1,
        )  # fmt: skip
        norm = {"norm_weight": v, "norm_bias": v} if emit == "norm" else {}
        yield Case(
            f"layer_norm {emit} {name}",
            lambda x=x, v=v, c=codes, e=emit, n=norm: layer_norm_quantize(
                x, v, v, 1e-5, c, residual=x if e else None, emit=e, **n, **TRITON
            ), first=M == 1, stack=32 * (K == 20001),
        )  # fmt: skip
        for block in {K, 128 if K % 128 == 0 else 1}:
            if block > 8192:  # no kernel holds it in registers
                continue
            yield Case(
                f"hadamard {block} {name}",
                lambda x=x, v=v, c=codes, b=block: hadamard_quantize(
                    x, v, None, c, block=b, out_multiplier=v, out_offset=v, **TRITON
                ), first=K in (2, 768),
            )  # fmt: skip


OUTPUTS: tuple[dict[str, Any], ...] = (
    {"out_dtype": torch.bfloat16},
    {"out_codes": Codes(8), "out_step": 0.5, "out_zero_point": 1, "activation": "gelu"},
    {"activation": "gelu_tanh", "out_dtype": torch.float16},
    {"out_codes": Codes(4, offset=8), "out_step": 0.5, "out_zero_point": 3},
    {},
)


def integer_linears() -> Iterator[Case]:
    axes = ROWS, SHAPES, GROUPS, ("W8A8", "W4A8", "W4A4"), OUTPUTS, ("none", "token", "group")
    for M, (N, K), size, op, out, scale, zero_point, unsigned in pairwise(
        *axes, (0, 1, -100), (False, True)
    ):
        G = 1 if size is None else -(-K // size)
        x_scale = None if scale == "none" else empty(M, G if scale == "group" else 1)
        options = {**out, "x_zero_point": zero_point, "group_size": size, "x_scale": x_scale}
        name = f"{op} {M}x{N}x{K} groups {size} {scale} zero point {zero_point} {out}"
        x = u8(M, K) if unsigned else i8(M, K, unaligned=K == 100)
        yield Case(
            name,
            lambda op=op, x=x, N=N, K=K, G=G, o=options: _integer_linear(op, x, N, K, G, o),
            M == 1 and K == 4096,
            288 if K == 100 else 16 * (size == 32),
        )  # fmt: skip


def _integer_linear(op: str, x: Tensor, N: int, K: int, G: int, options: dict[str, Any]) -> Tensor:
    vectors, width = (empty(N, G), empty(N)), packed_width(K)
    if op == "W8A8":
        return int8_linear(x, i8(N, K), *vectors, **options, **TRITON)
    packed = op == "W4A4"
    return int4_linear(
        u8(len(x), width) if packed else x, u8(N, width), *vectors, in_features=K, x_packed=packed,
        **options, **TRITON,
    )  # fmt: skip


def float_linears() -> Iterator[Case]:
    """Weight-only."""
    for M, (N, K), size, bits, dtype, zero in pairwise(
        ROWS, SHAPES, GROUPS, (4, 8), FLOATS, (False, True)
    ):
        float32, odd = dtype == torch.float32, K == 100
        yield Case(
            f"W{bits}A16 {M}x{N}x{K} groups {size} {dtype} zero point {zero}",
            lambda M=M, N=N, K=K, b=bits, d=dtype, z=zero, s=size: _float_linear(
                M, N, K, b, d, z, s, unaligned=K == 100
            ), M in (1, 64) and K == 4096,
            384 if float32 and odd else 128 * (float32 or odd),
        )  # fmt: skip


def _float_linear(
    M: int, N: int, K: int, bits: int, dtype: torch.dtype, zero_point: bool, size: int | None,
    unaligned: bool = False,
) -> Tensor:  # fmt: skip
    G = 1 if size is None else -(-K // size)
    w = u8(1, packed_width(K)) if bits == 4 else i8(1, K)
    return weight_only_linear(
        empty(M, K, dtype=dtype, unaligned=unaligned), w.expand(N, -1), empty(N, G), empty(N),
        w_zero_point=empty(N, G) if zero_point else None, bits=bits, in_features=K,
        group_size=size, **TRITON,
    )  # fmt: skip


def gemv() -> Iterator[Case]:
    """One and two tokens of four-bit weights, without a tensor core."""
    shapes, sizes = (*SHAPES, (9, 4), (24, 1028)), (None, 128, 32, 16)
    for M, (N, K), size, dtype, zero in pairwise((1, 2), shapes, sizes, FLOATS, (False, True)):
        yield Case(
            f"gemv W4A16 {M}x{N}x{K} groups {size} {dtype} zero point {zero}",
            lambda M=M, N=N, K=K, d=dtype, z=zero, s=size: _float_linear(M, N, K, 4, d, z, s),
            K == 4096, kernel="gemv_floats_kernel",
        )  # fmt: skip
    scales, zero_points = ("none", "token", "group"), (0, 1, -100)
    for M, (N, K), size, out, scale, zero_point in pairwise(
        (1, 2), shapes, sizes, OUTPUTS, scales, zero_points
    ):
        G = 1 if size is None else -(-K // size)
        x_scale = None if scale == "none" else empty(M, G if scale == "group" else 1)
        options = {**out, "x_zero_point": zero_point, "group_size": size, "x_scale": x_scale}
        yield Case(
            f"gemv W4A8 {M}x{N}x{K} groups {size} {scale} zero point {zero_point} {out}",
            lambda M=M, N=N, K=K, G=G, o=options: _integer_linear("W4A8", i8(M, K), N, K, G, o),
            K == 4096, kernel="gemv_integers_kernel",
        )  # fmt: skip


def fp8_linears() -> Iterator[Case]:
    for M, (N, K), token in product(ROWS, SHAPES, (True, False)):
        yield Case(
            f"fp8 {M}x{N}x{K} {'token' if token else 'static'}",
            lambda M=M, N=N, K=K, t=token: fp8_linear(
                u8(M, K, unaligned=K == 100).view(E4M3), u8(N, K).view(E4M3), empty(N, 1), empty(N),
                x_scale=empty(M, 1) if t else None, out_dtype=torch.bfloat16, **TRITON,
            ), M == 1 and K == 4096,
        )  # fmt: skip


@contextmanager
def hopper() -> Iterator[None]:
    """Products of many tokens are planned as on a Hopper."""

    def tile(
        kernel: str, M: int, N: int, K: int, *, plain: bool, **_: Any
    ) -> dict[str, Any] | None:
        return _tma.rule(M, N, plain and kernel == "int8_linear")

    before = int8_module.tma_tile, fp8_module.tma_tile
    int8_module.tma_tile = fp8_module.tma_tile = tile
    forget()
    try:
        yield
    finally:
        int8_module.tma_tile, fp8_module.tma_tile = before
        forget()


def bulk() -> Iterator[Case]:
    """Tiles that are copied in bulk, of both sizes."""
    for (N, K), out, token, fp8 in product(
        ((4096, 4096), (768, 3072)), OUTPUTS, (True, False), (False, True)
    ):
        if fp8 and "out_codes" in out:
            continue

        def run(N: int = N, K: int = K, o: Any = out, t: bool = token, f: bool = fp8) -> None:
            x_scale = empty(4096, 1) if t else None
            op, dtype = (fp8_linear, E4M3) if f else (int8_linear, torch.int8)
            with hopper():
                op(
                    u8(4096, K).view(dtype), u8(N, K).view(dtype), empty(N, 1), empty(N),
                    x_scale=x_scale, **o, **TRITON,
                )  # fmt: skip

        yield Case(f"bulk {'fp8' if fp8 else 'int8'} {N}x{K} token {token} {out}", run, out == {})


SOFTMAX: tuple[dict[str, Any], ...] = (
    {"softmax": "code", "steps": 4},
    {"softmax": "float"},
    {"softmax": "log2", "bits": 4},
    {"softmax": "uniform", "bits": 8},
    {"softmax": "code", "steps": 1, "causal": True},
    {"softmax": "matthew", "bits": 6},
    {"softmax": "log2", "bits": 5, "steps": 2, "renormalize": True},
)


def attention(fp8: bool) -> Iterator[Case]:
    """Every head size with every operand; lengths of one tile, of two passes, and of a walk."""
    operands = ("fp8",) if fp8 else ("float32", "float16", "bfloat16", "int8", "int4")
    kinds = [SOFTMAX[i] for i in (0, 2, 4)] if fp8 else SOFTMAX
    axes = HEADS, (1, 64, 197, 512, 700), operands, kinds, ("none", "keys", "all")
    for D, T, operand, kind, mask in pairwise(*axes):
        yield Case(
            f"attention {operand} D={D} T={T} {kind} mask {mask}",
            lambda D=D, T=T, o=operand, k=kind, m=mask: _attend(D, T, o, k, m),
            T in (197, 700) and D in (64, 128),
            waits=mask == "all" or (D > 64 and "float" in operand),
        )  # fmt: skip


def sequences(fp8: bool) -> Iterator[Case]:
    """Sentences one after another, of one tile, of two passes, and of a walk."""
    operands = ("fp8",) if fp8 else ("float16", "bfloat16", "int8")
    kinds = [SOFTMAX[i] for i in (0, 2)] if fp8 else SOFTMAX[:4]
    for D, T, operand, kind, causal in pairwise(
        HEADS[:4], (1, 197, 512, 700), operands, kinds, (False, True)
    ):
        yield Case(
            f"sequences {operand} D={D} T={T} {kind} causal {causal}",
            lambda D=D, T=T, o=operand, k=kind, c=causal: _attend(
                D, T, o, {**k, "causal": c}, "sequences"
            ),
            T in (197, 700) and D == 64,
            400 * (D > 64 and operand == "fp8"),  # sm_100, triton 3.9
            causal or (D > 64 and "float" in operand),
        )  # fmt: skip


def heads() -> Iterator[Case]:
    """q, k and v of one product, and copies of few queries and many keys."""
    for (Tq, Tk), D, dtype, transposed in pairwise(
        ((1, 1), (197, 197), (512, 512), (1, 700)), HEADS, FLOATS, (False, True)
    ):

        def run(
            Tq: int = Tq, Tk: int = Tk, D: int = D, d: Any = dtype, t: bool = transposed
        ) -> Any:
            q, k, v = empty(2, Tk, 3, 3, D, dtype=d).permute(2, 0, 3, 1, 4)
            if Tq != Tk:
                q, k, v = q[:, :, :Tq], k.contiguous(), v.contiguous()
            return heads_quantize(q, k, v, empty(3, D), 8, transposed=t, **TRITON)

        yield Case(f"heads Tq={Tq} Tk={Tk} D={D} {dtype} {transposed}", run, Tq == 197)


def _attend(D: int, T: int, operand: str, kind: dict[str, Any], mask: str) -> Tensor:
    options: dict[str, Any] = dict(kind)
    B, H = 2, 3
    if operand.startswith(("float", "bfloat")):
        q = k = v = empty(B, H, T, D, dtype=getattr(torch, operand))
    else:
        options |= {"q_scale": empty(B, H, T), "k_scale": empty(B, H, 1)}
        q = k = u8(B, H, T, -(-D // 2)) if operand == "int4" else i8(B, H, T, D)
        v = i8(B, H, D, T).transpose(2, 3)
        if operand == "fp8":
            v = v.view(E4M3)
        else:
            options["v_scale"] = empty(B, H, D)
    if kind["softmax"] == "matthew":
        options["step"] = empty(H)
    if mask == "sequences":
        options |= {"sequences": torch.ones(B, 3, dtype=torch.int32), "longest": T}
        options |= {name: x[:1] for name, x in options.items() if name.endswith("_scale")}
        q, k, v = (x[:1] for x in (q, k, v))
    elif mask != "none":
        shape = (B, 1, 1, T) if mask == "keys" else (B, H, T, T)
        options["mask"] = torch.ones(shape, dtype=torch.bool)
    return quantized_attention(q, k, v, **options, **TRITON)


OPS: dict[str, Callable[[], Iterator[Case]]] = {
    "quantizers": quantizers,
    "integer_linears": integer_linears,
    "float_linears": float_linears,
    "fp8_linears": fp8_linears,
    "gemv": gemv,
    "heads": heads,
    "bulk": bulk,  # of Hopper alone
    "attention": lambda: attention(False),
    "fp8_attention": lambda: attention(True),
    "sequences": lambda: sequences(False),
    "fp8_sequences": lambda: sequences(True),
}
