"""The second phase of a linear layer whose sum over K is split among programs.

    out[m, n] = epilogue( sum_s parts[s, m, n] )

Few tokens make few tiles; splitting K fills the GPU. The splits are added in a fixed order, without
atomics, so that results do not change from run to run; integer parts give the very bits of one
program that adds everything.
"""

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from ._lang import entry, scaled, store_linear, tl
from ._launch import cdiv
from ._plan import Plan, row_step
from .dispatch import on_device

BLOCK = 256  # output channels of a program


@entry
def _add_parts_kernel(
    parts_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, out_ptr, M, N, out_step, out_zero_point,
    SPLIT_K: tl.constexpr, RIGHT_SHIFT: tl.constexpr, ACTIVATION: tl.constexpr,
    QMIN: tl.constexpr, QMAX: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(1).to(tl.int64) + tl.arange(0, 1)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    at = offs_m[:, None] * N + offs_n[None, :]
    mask = (offs_n < N)[None, :]
    p = tl.load(parts_ptr + at, mask=mask, other=0)
    for s in tl.static_range(1, SPLIT_K):
        p += tl.load(parts_ptr + s * M.to(tl.int64) * N + at, mask=mask, other=0)
    if RIGHT_SHIFT:
        p = p >> RIGHT_SHIFT
    y = scaled(p, x_scale_ptr, w_scale_ptr, offs_m, offs_n, M, N, offs_m, offs_n, False)
    store_linear(
        out_ptr, y, bias_ptr, offs_m, offs_n, M, N, out_step, out_zero_point,
        False, ACTIVATION, QMIN, QMAX,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class LinearPlan(Plan):
    """A matrix product: its result is [..., N], then parts [SPLIT_K, M, N] if there are several.

    Attributes:
        second: grid, numbers and options of the launch that adds the parts, or None.
        scaled: the parts are scaled already.
        few: the product of few tokens runs, `_gemv.py`.
        bulk: the product of many tokens runs whose tiles are copied in bulk, `_tma.py`.
    """

    second: Plan | None
    scaled: bool
    few: bool = False
    bulk: bool = False


def plan_linear(
    shape: torch.Size,
    stride: tuple[int, ...],
    N: int,
    out_dtype: torch.dtype,
    tile: dict[str, Any],
    numbers: tuple[int | float, ...],
    options: dict[str, Any],
    *,
    integers: bool,
    scaled: bool,
    right_shift: int = 0,
    out: tuple[float, int] = (1.0, 0),
    epilogue: dict[str, Any],
) -> LinearPlan:
    """The launches of a linear layer on x of `shape`.

    Args:
        tile: from `gemm_launch`.
        numbers, options: of the product's kernel, without the tile.
        integers: what the parts are, scaled: whether the scales are in them already.
        right_shift: bits that integer parts are too large by.
        out: step and zero point of codes.
        epilogue: ACTIVATION, QMIN and QMAX of `store_linear`.
    """
    M, split = prod(shape[:-1]), tile["SPLIT_K"]
    results: list[tuple[tuple[int, ...], torch.dtype]] = [((*shape[:-1], N), out_dtype)]
    second = None
    if split > 1:
        results.append(((split, M, N), torch.int32 if integers else torch.float32))
        fixed = {
            "SPLIT_K": split, "RIGHT_SHIFT": right_shift, **epilogue, "BLOCK_N": BLOCK,
            "num_warps": 2, "enable_fp_fusion": False,  # as the epilogue of one program
        }  # fmt: skip
        second = Plan(False, (), (cdiv(N, BLOCK), M), (M, N, *out), fixed)
    grid = (cdiv(M, tile["BLOCK_M"]) * cdiv(N, tile["BLOCK_N"]), split)
    copy = row_step(shape, stride) is None
    return LinearPlan(copy, results, grid, numbers, {**options, **tile}, second, scaled)


def plan_few(
    shape: torch.Size, N: int, out_dtype: torch.dtype, tile: dict[str, Any],
    numbers: tuple[int | float, ...], options: dict[str, Any],
) -> LinearPlan:  # fmt: skip
    """The one launch of a product of few tokens, with a tile of `gemv_tile`."""
    results = [((*shape[:-1], N), out_dtype)]
    grid = (cdiv(N, tile["BLOCK_N"]),)
    return LinearPlan(False, results, grid, numbers, {**options, **tile}, None, True, few=True)


def launch_linear(
    kernel: Any,
    plan: LinearPlan,
    x: Tensor,
    operands: tuple[Tensor | None, ...],
    bias: Tensor | None,
    x_scale: Tensor | None = None,
    w_scale: Tensor | None = None,
) -> Tensor:
    """Runs a linear's kernel on x and its other operands, and adds the parts if there are any."""
    y, *parts = plan.empty(x.device)
    bias = None if bias is None else bias.contiguous()
    with on_device(x, *operands, bias):
        kernel[plan.grid](
            x.contiguous() if plan.copy else x, *operands, bias, y, *(parts or (None,)),
            *plan.numbers, **plan.options,
        )  # fmt: skip
        if plan.second is not None:
            scales = (None, None) if plan.scaled else (x_scale, w_scale)
            _add_parts_kernel[plan.second.grid](
                parts[0], *scales, bias, y, *plan.second.numbers, **plan.second.options
            )
    return y
