"""The kernels' variants that are compiled: row kernels, matrix products, and their parameters."""

from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl

from qtk_kernels import (
    _gemv,
    _split_k,
    _tma,
    fp8_linear,
    hadamard_quantize,
    heads_quantize,
    int4_linear,
    int8_linear,
    layer_norm_quantize,
    shift_scale_quantize,
)
from qtk_kernels import weight_only_linear as weight_only
from qtk_kernels._launch import gemm_launch
from qtk_kernels.codes import EPS, Codes, channels_of
from qtk_kernels.hadamard import split


@dataclass(frozen=True)
class Variant:
    """One kernel with its compile-time parameters."""

    name: str
    kernel: Any
    types: dict[str, str]  # of pointers, "*i8" and so on; a pointer not named is None
    params: dict[str, Any]


def row_variants() -> list[Variant]:
    """LayerNorm and elementwise quantizers."""
    specs = {
        "w8 tensor": Codes(8), "w8 token": Codes(8, "token"), "w4 g128": Codes(4, 128, packed=True),
        "w8 g100": Codes(8, 100),
    }  # fmt: skip
    out = []
    for label, codes in specs.items():
        for K in (768, 4096, 32768):
            launch = codes.launch(4096, K)
            walk = channels_of(launch) < K
            q = "*u8" if codes.packed else "*i8"
            scale = {} if codes.static else {"scale_ptr": "*fp32"}
            out.append(Variant(
                f"layer_norm_quantize {label} K={K}",
                layer_norm_quantize._layer_norm_quantize_kernel,
                {"x_ptr": "*bf16", "residual_ptr": "*bf16", "weight_ptr": "*fp32",
                 "bias_ptr": "*fp32", "q_ptr": q, "emitted_ptr": "*bf16", **scale},
                {**launch, "WALK": walk},
            ))  # fmt: skip
            for activation in ("", "gelu", "gelu_tanh"):
                out.append(Variant(
                    f"{activation or 'shift_scale'}_quantize {label} K={K}",
                    shift_scale_quantize._shift_scale_quantize_kernel,
                    {"x_ptr": "*bf16", "multiplier_ptr": "*fp32", "offset_ptr": "*fp32",
                     "q_ptr": q, **scale},
                    {**launch, "ACTIVATION": activation,
                     "WALK": walk and codes.granularity == "token"},
                ))  # fmt: skip
        for K, block in ((4096, 128), (768, 768)):
            fused = hadamard_quantize.hadamard_launch(4096, K, block, codes)
            if fused is None:  # PyTorch rotates
                continue
            types = {"x_ptr": "*bf16", "multiplier_ptr": "*fp32", "out_multiplier_ptr": "*fp32",
                     "q_ptr": "*u8" if codes.packed else "*i8"}  # fmt: skip
            types |= {} if codes.static else {"scale_ptr": "*fp32"}
            types |= {"left_ptr": "*fp32", "right_ptr": "*fp32"} if fused["BLOCKS"] else {}
            _, f, p = split(block)
            out.append(Variant(
                f"hadamard_quantize {label} K={K} block={block} ({f}x{p})",
                hadamard_quantize._hadamard_quantize_kernel, types, fused,
            ))  # fmt: skip
    for transposed in (False, True):
        where = {"stride_wt": 1} if transposed else {"stride_wd": 1}
        pointers = {f"{name}_ptr": "*bf16" for name in "qkv"}
        pointers |= {f"{name}_codes_ptr": "*i8" for name in "qkv"}
        floats = ("v_multiplier", "q_scale", "k_scale")
        out.append(Variant(
            f"heads_quantize w8 K=64{', v transposed' * transposed}",
            heads_quantize.heads_quantize_kernel,
            {**pointers, **{f"{name}_ptr": "*fp32" for name in floats}},
            {"QMIN": -128, "QMAX": 127, "LEAST": EPS, "ROWS": 32, "BLOCK_D": 64, "D": 64,
             **where, "num_warps": 4},
        ))  # fmt: skip
    codes = Codes(8)
    for K in (768, 1024, 4096):
        launch = codes.launch(4096, K)
        out.append(Variant(
            f"layer_norm_quantize w8 tensor K={K}, no residual",
            layer_norm_quantize._layer_norm_quantize_kernel,
            {"x_ptr": "*bf16", "weight_ptr": "*fp32", "bias_ptr": "*fp32", "q_ptr": "*i8"},
            {**launch, "WALK": False},
        ))  # fmt: skip
    return out


def gemm_variants() -> list[Variant]:
    """Matrix products, for a few tokens and for many; odd groups; the second phase of a split."""
    out = []
    for M in (1, 32, 64, 256, 8192):
        for group in (0, 128):
            out += [_int8(M, group), _weight_only(M, group, False), _weight_only(M, group, True)]
            out += [_int4(M, group, packed) for packed in (False, True)]
        out.append(_fp8(M))
    out += [_bulk(fp8) for fp8 in (False, True)]
    out += [_gemv_of(M, group, op) for M in (1, 2) for group in (0, 128) for op in GEMV]
    out.append(_int8(128, 0, N=768, K=3072))  # BERT-base, one text
    out += [_int8(8192, 100), _int4(16, 100, False), _weight_only(16, 100, True)]
    requantize: dict[str, Any] = {"ACTIVATION": "gelu", "QMIN": -128, "QMAX": 127}
    name = "gelu requantize M=8192"
    out += [_int8(8192, 0, name, "*i8", HAS_ZERO_POINT=True, **requantize),
            _int4(8192, 0, False, name, "*i8", **requantize)]  # fmt: skip
    for parts in ("*i32", "*fp32"):
        types = {"parts_ptr": parts, "bias_ptr": "*fp32", "out_ptr": "*bf16"}
        types |= {"x_scale_ptr": "*fp32", "w_scale_ptr": "*fp32"} if parts == "*i32" else {}
        out.append(Variant(
            f"add_parts {parts[1:]}", _split_k._add_parts_kernel, types,
            {"SPLIT_K": 8, "RIGHT_SHIFT": 4 if parts == "*i32" else 0, "ACTIVATION": "", "QMIN": 0,
             "QMAX": 0, "BLOCK_N": _split_k.BLOCK, "num_warps": 2},
        ))  # fmt: skip
    return out


SCALES = {"x_scale_ptr": "*fp32", "w_scale_ptr": "*fp32", "bias_ptr": "*fp32"}
PLAIN = {
    "EVEN": True,
    "X_GROUPS": False,
    "HAS_ZERO_POINT": False,
    "ACTIVATION": "",
    "QMIN": 0,
    "QMAX": 0,
}


def _outputs(tile: dict[str, Any], integers: bool, out: str = "*bf16") -> dict[str, str]:
    """The result, or the parts of a split sum."""
    parts = {"parts_ptr": "*i32" if integers else "*fp32"} if tile["SPLIT_K"] > 1 else {}
    return {"out_ptr": out, **parts}


def _name(op: str, M: int, group: int, tile: dict[str, Any]) -> str:
    return f"{op} M={M} g={group}" + (f" split={tile['SPLIT_K']}" if tile["SPLIT_K"] > 1 else "")


def _int8(
    M: int, group: int, name: str = "", out: str = "*bf16", *, N: int = 4096, K: int = 4096,
    **params: Any,
) -> Variant:  # fmt: skip
    tile = gemm_launch("int8_linear", M, N, K, grouped=group > 0, computed_weights=False)
    op = "int8_linear" if N == K else f"int8_linear {N}x{K}"
    return Variant(
        f"int8_linear {name}" if name else _name(op, M, group, tile),
        int8_linear._int8_linear_kernel,
        {"x_ptr": "*i8", "w_ptr": "*i8", **SCALES, **_outputs(tile, not group, out)},
        {**PLAIN, "EVEN": group % 128 == 0, "GROUP": group, "BLOCK_K": 128, **tile, **params},
    )  # fmt: skip


def _int4(
    M: int, group: int, packed: bool, name: str = "", out: str = "*bf16", **params: Any
) -> Variant:
    op = f"int4_linear W4A{4 if packed else 8}"
    tile = gemm_launch(op, M, 4096, 4096, grouped=group > 0, weight_bits=4, computed_weights=True,
                       computed_tokens=packed)  # fmt: skip
    return Variant(
        f"{op} {name}" if name else _name(op, M, group, tile), int4_linear._int4_linear_kernel,
        {"x_ptr": "*u8" if packed else "*i8", "w_ptr": "*u8", **SCALES,
         **_outputs(tile, not group, out)},
        {**PLAIN, "GROUP": group, "X_PACKED": packed, "BYTES": 64, **tile, **params},
    )  # fmt: skip


def _weight_only(M: int, group: int, packed: bool) -> Variant:
    op = f"weight_only_linear W{4 if packed else 8}A16"
    tile = gemm_launch(op, M, 4096, 4096, grouped=group > 0, weight_bits=4 if packed else 8,
                       computed_weights=True, wide=True)  # fmt: skip
    return Variant(
        _name(op, M, group, tile), weight_only._weight_only_linear_kernel,
        {"x_ptr": "*bf16", "w_ptr": "*u8" if packed else "*i8", "w_scale_ptr": "*fp32",
         "bias_ptr": "*bf16", **_outputs(tile, False)},
        {"GROUP": group, "PACKED": packed, "EVEN": packed or group % 64 == 0,
         "HAS_ZERO_POINT": False, "DTYPE": tl.bfloat16, "WIDTH": 64, **tile},
    )  # fmt: skip


HOPPER = 90


def only_on(name: str) -> tuple[int, ...] | None:
    """The architectures that a variant is for, None for all."""
    return (HOPPER,) if " bulk " in name else None


def _bulk(fp8: bool) -> Variant:
    op = "fp8_linear" if fp8 else "int8_linear"
    tile = _tma.rule(8192, 4096, not fp8)
    assert tile is not None
    x = "*fp8e4nv" if fp8 else "*i8"
    return Variant(
        f"{op} bulk M=8192 g=0", _tma.tma_linear_kernel,
        {"x_ptr": x, "w_ptr": x, **SCALES, "out_ptr": "*bf16"},
        {"FP8": fp8, "ACTIVATION": "", "QMIN": 0, "QMAX": 0, **tile},
    )  # fmt: skip


GEMV = ("weight_only_linear W4A16", "int4_linear W4A8")


def _gemv_of(M: int, group: int, op: str) -> Variant:
    floats = op == GEMV[0]
    tile = _gemv.gemv_tile(op, M, 4096, 4096, 2048, device=torch.device("cpu"), group=group,
                           row=4096, start=0)  # fmt: skip
    assert tile is not None
    types = {"w_ptr": "*u8", "w_scale_ptr": "*fp32", "out_ptr": "*bf16"}
    params = {"GROUP": group, "HAS_ZERO_POINT": False, **tile}
    if floats:
        return Variant(
            f"gemv {op} M={M} g={group}", _gemv.gemv_floats_kernel,
            {**types, "x_ptr": "*bf16", "bias_ptr": "*bf16"}, params,
        )  # fmt: skip
    return Variant(
        f"gemv {op} M={M} g={group}", _gemv.gemv_integers_kernel,
        {**types, "x_ptr": "*i8", "x_scale_ptr": "*fp32", "bias_ptr": "*fp32"},
        {**params, "X_GROUPS": False, "ACTIVATION": "", "QMIN": 0, "QMAX": 0},
    )  # fmt: skip


def _fp8(M: int) -> Variant:
    tile = gemm_launch("fp8_linear", M, 4096, 4096, grouped=False, computed_weights=False)
    return Variant(
        _name("fp8_linear", M, 0, tile), fp8_linear._fp8_linear_kernel,
        {"x_ptr": "*fp8e4nv", "w_ptr": "*fp8e4nv", **SCALES, **_outputs(tile, False)},
        {"ACTIVATION": "", "EVEN": True, "BLOCK_K": 128, **tile},
    )  # fmt: skip
