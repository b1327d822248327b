"""Many tokens on Hopper: tiles that the bulk copy engine brings, while other warps multiply.

    y = epilogue( x_q w_q^T )        x_q [M, K], w_q [N, K], both int8 or both e4m3, one group

The formulas, and the definitions in plain PyTorch, are those of `int8_linear.py` and
`fp8_linear.py`. Operands are read through tensor descriptors: a copy of a tile is one instruction
of one thread, and what lies outside is zero, so that neither edges nor a tail of K need a mask.
Of three groups of warps one copies and two multiply (`warp_specialize`); the compiler does that
for four warps in the source, and ignores it for eight. Descriptors want rows that begin on 16
bytes.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor

from ._lang import entry, scaled, store_linear, tile_of, tl, triton
from ._launch import SMS, card_of, cdiv, is_forced, measured
from ._split_k import LinearPlan
from .dispatch import on_device

HOPPER = (9, 0)
FEWEST = 512  # tokens
BLOCK_K = 128


def tma_tile(
    kernel: str, M: int, N: int, K: int, *, device: torch.device, plain: bool
) -> dict[str, Any] | None:
    """The parameters of a launch; None where the present kernel serves.

    Args:
        kernel: the op's name in the tables of measured tiles, whose word counts.
        plain: the epilogue neither activates nor rounds, and writes 16 bits.
    """
    if device.type != "cuda" or is_forced() or M < FEWEST or K % 16 or K < 2 * BLOCK_K:
        return None
    if card_of(device).capability != HOPPER:
        return None
    if measured(kernel, M, N, K, device, grouped=False) is not None:
        return None
    return rule(M, N, plain and kernel == "int8_linear")


def rule(M: int, N: int, wide: bool) -> dict[str, Any] | None:
    """Tiles of 128 by 256, or by 128 where those are too few; None where both are.

    Args:
        wide: 256 fit: sums of e4m3 blocks go to others in float32, and activations spill;
            float32 results pass through 128 KB of shared memory.
    """
    wide = wide and cdiv(M, 128) * cdiv(N, 256) >= SMS
    if cdiv(M, 128) * cdiv(N, 128) < SMS:
        return None
    return {
        "BLOCK_M": 128, "BLOCK_N": 256 if wide else 128, "BLOCK_K": BLOCK_K, "GROUP_M": 8,
        "num_warps": 4, "num_stages": 3 if wide else 4,
    }  # fmt: skip


def plan_tma(
    shape: torch.Size, N: int, out_dtype: torch.dtype, tile: dict[str, Any],
    x_scale_step: int, out: tuple[float, int], epilogue: dict[str, Any], *, fp8: bool,
) -> LinearPlan:  # fmt: skip
    """The one launch on x of `shape`, with a tile of `tma_tile`.

    Args:
        x_scale_step: from token to token; out: step and zero point of codes.
        epilogue: ACTIVATION, QMIN and QMAX of `store_linear`.
    """
    M, K = prod(shape[:-1]), shape[-1]
    grid = (cdiv(M, tile["BLOCK_M"]) * cdiv(N, tile["BLOCK_N"]),)
    numbers = (M, N, K, cdiv(K, tile["BLOCK_K"]), *out, x_scale_step)
    options = {"FP8": fp8, **epilogue, **tile, "enable_fp_fusion": False}  # as the reference rounds
    results = [((*shape[:-1], N), out_dtype)]
    return LinearPlan(False, results, grid, numbers, options, None, False, bulk=True)


def aligned(*operands: Tensor) -> bool:
    """Whether rows [..., K] of bytes begin on 16 bytes."""
    return all(x.storage_offset() % 16 == 0 for x in operands)


def _scratch(size: int, _alignment: int, _stream: Any) -> Tensor:
    """Memory for descriptors, 128 bytes for each program and operand; torch aligns to 512."""
    return torch.empty(size, dtype=torch.int8, device=torch.device("cuda"))


@entry
def tma_linear_kernel(
    x_ptr, w_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, out_ptr,
    M, N, row_bytes, steps, out_step, out_zero_point, stride_xsm,
    FP8: tl.constexpr, ACTIVATION: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    pid_m, pid_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    # made here, not by the host: the compiler halves the blocks of x for two groups of warps
    x_desc = tl.make_tensor_descriptor(x_ptr, [M, row_bytes], [row_bytes, 1], [BLOCK_M, BLOCK_K])
    w_desc = tl.make_tensor_descriptor(w_ptr, [N, row_bytes], [row_bytes, 1], [BLOCK_N, BLOCK_K])
    first_m, first_n = pid_m * BLOCK_M, pid_n * BLOCK_N
    y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32 if FP8 else tl.int32)
    for step in tl.range(0, steps, warp_specialize=True):
        x = x_desc.load([first_m, step * BLOCK_K])
        w = w_desc.load([first_n, step * BLOCK_K])
        if FP8:  # every block is added in float32, as in `fp8_linear`
            y += tl.dot(x, w.T, max_num_imprecise_acc=BLOCK_K)
        else:
            y = tl.dot(x, w.T, y, out_dtype=tl.int32)
    offs_m, offs_n = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
    y = scaled(
        y, x_scale_ptr, w_scale_ptr, offs_m, offs_n, M, N,
        offs_m.to(tl.int64) * stride_xsm, offs_n, False,
    )  # fmt: skip
    store_linear(
        out_ptr, y, bias_ptr, offs_m, offs_n, M, N, out_step, out_zero_point,
        False, ACTIVATION, QMIN, QMAX,
    )  # fmt: skip


def launch_tma(
    plan: LinearPlan, x: Tensor, w: Tensor, x_scale: Tensor | None, w_scale: Tensor,
    bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """Runs a plan of `plan_tma` on x [..., K] and w [N, K], both contiguous."""
    (y,) = plan.empty(x.device)
    bias = None if bias is None else bias.contiguous()
    with on_device(x, w, x_scale, w_scale, bias):
        triton.set_allocator(_scratch)  # of this context, for this launch: others set theirs
        tma_linear_kernel[plan.grid](x, w, x_scale, w_scale, bias, y, *plan.numbers, **plan.options)
    return y
