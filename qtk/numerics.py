"""Scales, codes and back, in plain PyTorch: the arithmetic that every part of qtk shares.

code = clamp(round(x / scale) + zero_point, qmin, qmax)         round half to even
x_hat = (code - zero_point) * scale
"""

import math

import torch
from torch import Tensor

from qtk.scheme import Format

LARGEST_FP8 = 448.0  # of e4m3
EPS = 1e-8  # smallest range: an all-zero tensor gets a tiny scale, not a division by zero


def scale_and_zero_point(lo: Tensor, hi: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """The grid that covers [lo, hi].

    Args:
        lo, hi: any shape, the same for both; the range is widened to contain 0.
        fmt: bits and symmetry.

    Returns:
        scale, float32, and zero_point, float32 holding integers (0 when symmetric).
    """
    lo, hi = lo.float().clamp(max=0), hi.float().clamp(min=0)
    if fmt.symmetric:
        scale = torch.maximum(-lo, hi).clamp(min=EPS) / fmt.qmax
        return scale, torch.zeros_like(scale)
    scale = (hi - lo).clamp(min=EPS) / (fmt.qmax - fmt.qmin)
    zero_point = (fmt.qmin - lo / scale).round().clamp(fmt.qmin, fmt.qmax)
    return scale, zero_point


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | int, fmt: Format) -> Tensor:
    """Codes of x, float32 holding integers; `scale` and `zero_point` broadcast against x."""
    return (torch.round(x.float() / scale) + zero_point).clamp(fmt.qmin, fmt.qmax)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor | int = 0) -> Tensor:
    """Values of codes, float32."""
    return (q.float() - zero_point) * scale


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor | int, fmt: Format) -> Tensor:
    """x rounded to its grid, float32: what integers would compute, in floating point."""
    return dequantize(quantize(x, scale, zero_point, fmt), scale, zero_point)


def fake_quantize_token(x: Tensor, bits: int, clip: float = 1.0) -> Tensor:
    """x rounded with one symmetric scale per row, taken from the row itself.

    Args:
        x: [..., K].
        bits: width of a code.
        clip: share of the row's maximum that the largest code stands for.
    """
    fmt = Format(bits, granularity="token")
    amax = x.float().abs().amax(-1, keepdim=True).clamp(min=EPS) * clip
    return fake_quantize(x, amax / fmt.qmax, 0, fmt)


def fake_quantize_fp8(x: Tensor) -> Tensor:
    """x [..., K] rounded to e4m3 with one scale per row, float32."""
    codes, scale = to_fp8(x)
    return codes.float() * scale


def to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., K] -> e4m3 [..., K] and its scale [..., 1] float32, which lays the row's largest
    magnitude on 448."""
    limit = x.float().abs().amax(-1, keepdim=True).clamp(min=EPS)
    scale = limit / LARGEST_FP8
    return (x.float() / scale).clamp(-LARGEST_FP8, LARGEST_FP8).to(torch.float8_e4m3fn), scale


def in_groups(w: Tensor, group_size: int | None) -> Tensor:
    """[N, K] -> [N, G, group_size], the last group padded with zeros; G = 1 without groups."""
    N, K = w.shape
    size = group_size or max(K, 1)
    padded = torch.nn.functional.pad(w, (0, -K % size))
    return padded.view(N, -1, size)


def expand_groups(scale: Tensor, K: int, group_size: int | None) -> Tensor:
    """[N, G] -> [N, K]: the scale that each weight uses (as [N, 1] when there are no groups)."""
    if scale.shape[1] == 1:
        return scale
    assert group_size is not None
    return scale.repeat_interleave(group_size, dim=1)[:, :K]


def decibels(signal: float, noise: float) -> float:
    """Signal to quantization noise ratio of two energies, in dB; infinite without noise."""
    ratio = signal / noise if noise else math.inf
    return 10 * math.log10(ratio) if ratio else -math.inf
