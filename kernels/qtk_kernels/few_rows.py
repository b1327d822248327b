"""Weight-only int4 on a CPU, for few tokens: PyTorch's kernel, which unpacks weights in registers.

    y[m, n] = sum_k bf16(x[m, k]) * bf16(w_q[n, k] * bf16(w_scale[n, g]) + bf16(z[n, g])) + bias[n]

With a token at a time the bytes of the weights are what takes the time, and these are an eighth of
float32's. The kernel computes in bfloat16 and is fast up to some dozen tokens; in float32 it has a
slow fallback only. So float32 activations are rounded to bfloat16: the 16 bits of W4A16.

z is -w_zero_point * w_scale. M tokens, K input channels, N output channels, G groups.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

MOST_ROWS = (
    32  # 768x3072 on 2 cores: 16 tokens .58 ms against 1.3 by way of float32, 128 4.5 to 2.8
)
GROUPS = (256, 128, 64, 32)  # sizes that the kernel knows


@dataclass(frozen=True)
class FewRows:
    """The operand.

    Attributes:
        packed: [N, K / 2] uint8, in the kernel's layout for this CPU.
        scales: [G, N, 2] bfloat16: a scale, and what is added after it.
        group_size: channels in a group.
    """

    packed: Tensor
    scales: Tensor
    group_size: int


def few_rows_group(shape: tuple[int, int], groups: int, group_size: int | None) -> int | None:
    """The group size at which the kernel reads such weights here, None where it cannot.

    Args:
        shape: N and K of the weight.
        groups: G.
        group_size: channels in a group, if there is more than one.
    """
    N, K = shape
    sizes = [g for g in GROUPS if K % g == 0 and (groups == 1 or g == group_size)]
    if N % 16 or torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        return None
    return next(iter(sizes), None)


def prepare_few_rows(
    w_q: Tensor, w_scale: Tensor, w_zero_point: Tensor | None, group_size: int
) -> FewRows:
    """The operand of `few_rows_linear`.

    Args:
        w_q: [N, K] int8, -8 to 7.
        w_scale: [N, G] float32.
        w_zero_point: as w_scale, or None for 0.
        group_size: what `few_rows_group` says.
    """
    N, K = w_q.shape
    offset = torch.zeros_like(w_scale) if w_zero_point is None else -w_zero_point * w_scale
    pairs = torch.stack([w_scale, offset], -1).expand(N, K // group_size, 2)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu((w_q + 8).to(torch.int32), 1)
    scales = pairs.transpose(0, 1).to(torch.bfloat16).contiguous()
    return FewRows(packed, scales, group_size)


def few_rows_linear(x: Tensor, operand: FewRows, bias: Tensor | None) -> Tensor:
    """[..., K] floats -> [..., N] in x's dtype."""
    rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(
        rows, operand.packed, operand.group_size, operand.scales
    )
    y = y.to(x.dtype).view(*x.shape[:-1], -1)
    return y if bias is None else y.add_(bias.to(x.dtype))
