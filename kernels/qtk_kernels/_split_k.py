"""The second phase of a linear layer whose sum over K is split among programs.

    out[m, n] = epilogue( sum_s parts[s, m, n] )

Few tokens make few tiles; splitting K fills the GPU. The splits are added in a fixed order, without
atomics, so that results do not change from run to run; integer parts give the very bits of one
program that adds everything.
"""

import torch
from torch import Tensor

from ._lang import jit, scaled, store_linear, tl
from ._launch import cdiv

BLOCK = 256  # output channels of a program


@jit
def _add_parts_kernel(
    parts_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, out_ptr, M, N, out_step, out_zero_point,
    SPLIT_K: tl.constexpr, SHIFT: tl.constexpr, ACTIVATION: tl.constexpr,
    QMIN: tl.constexpr, QMAX: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(1).to(tl.int64) + tl.arange(0, 1)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    at = offs_m[:, None] * N + offs_n[None, :]
    mask = (offs_n < N)[None, :]
    p = tl.load(parts_ptr + at, mask=mask, other=0)
    for s in tl.static_range(1, SPLIT_K):
        p += tl.load(parts_ptr + s * M.to(tl.int64) * N + at, mask=mask, other=0)
    if SHIFT:
        p = p >> SHIFT
    y = scaled(p, x_scale_ptr, w_scale_ptr, offs_m, offs_n, M, N, offs_m, offs_n, False)
    store_linear(
        out_ptr, y, bias_ptr, offs_m, offs_n, M, N, out_step, out_zero_point,
        False, ACTIVATION, QMIN, QMAX,
    )  # fmt: skip


def empty_parts(split: int, M: int, N: int, integers: bool, like: Tensor) -> Tensor | None:
    """Uninitialized [split, M, N], or None where one program adds everything."""
    if split == 1:
        return None
    dtype = torch.int32 if integers else torch.float32
    return torch.empty((split, M, N), dtype=dtype, device=like.device)


def add_parts(
    parts: Tensor,
    out: Tensor,
    bias: Tensor | None,
    x_scale: Tensor | None = None,
    w_scale: Tensor | None = None,
    *,
    shift: int = 0,
    out_step: float = 1.0,
    out_zero_point: int = 0,
    **epilogue: int | str,
) -> None:
    """Adds parts [split, M, N] and writes out [M, N].

    Args:
        x_scale, w_scale: [M] and [N], or None where the parts are scaled already.
        shift: power of two that integer parts are too large by.
        epilogue: ACTIVATION, QMIN and QMAX of `store_linear`.
    """
    split, M, N = parts.shape
    _add_parts_kernel[(cdiv(N, BLOCK), M)](
        parts, x_scale, w_scale, bias, out, M, N, out_step, out_zero_point,
        SPLIT_K=split, SHIFT=shift, **epilogue, BLOCK_N=BLOCK, num_warps=2,
        enable_fp_fusion=False,  # as the epilogue of one program
    )  # fmt: skip
