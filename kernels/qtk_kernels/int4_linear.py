"""Linear layer on integer codes with packed int4 weights: W4A8 and W4A4.

The same formula as `int8_linear.py`; the weights, and for W4A4 the activations, come in the layout
of `_int4.py` and are unpacked in registers.

M tokens, K input channels, N output channels, G groups of group_size channels (1 unless given).
"""

import torch
from torch import Tensor

from ._activation import activate, check_activation
from ._dispatch import backend_of, cpu_has_int8
from ._int4 import pack_int4, packed_width, unpack_int4
from .int8_linear import int8_linear, int8_linear_ref, prepare_int8, restore_int8


def prepare_int4(w_packed: Tensor, K: int, backend: str | None = None) -> Tensor:
    """The weights in the form that the backend reads. Done once.

    Args:
        w_packed: [N, ceil(K / 128) * 64], uint8, from `pack_int4`.
        K: input channels.

    Returns:
        operand: w_packed itself for Triton; on a CPU the operand of `prepare_int8`, because no CPU
            multiplies nibbles.
    """
    if w_packed.dtype != torch.uint8 or w_packed.ndim != 2 or (
        w_packed.shape[1] != packed_width(K)
    ):
        raise ValueError(
            f"{K} channels need uint8 [N, {packed_width(K)}], "
            f"got {w_packed.dtype} {list(w_packed.shape)}"
        )
    if backend_of(w_packed, backend) == "cpu":
        return prepare_int8(unpack_int4(w_packed, K), "cpu")
    return w_packed.contiguous()


def restore_int4(operand: Tensor, K: int) -> Tensor:
    """Inverts `prepare_int4`: w_packed [N, ceil(K / 128) * 64], uint8."""
    return operand if operand.dtype == torch.uint8 else pack_int4(restore_int8(operand))


def int4_linear_kernel_name(operand: Tensor, *, groups: int = 1, backend: str | None = None) -> str:
    """Which kernel `int4_linear` really runs for this operand."""
    name = backend_of(operand, backend)
    if name == "cpu":
        onednn = operand.is_mkldnn and groups == 1
        return "onednn.qlinear_pointwise (unpacked)" if onednn else (
            "float32 chunks, unpacked" if cpu_has_int8() else
            "float32 chunks, unpacked (no int8 instructions)"
        )
    return "triton int4_linear" if name == "triton" else "reference"


def int4_linear(
    x_q: Tensor,
    operand: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    *,
    in_features: int,
    x_packed: bool = False,
    x_scale: Tensor | None = None,
    x_zero_point: int = 0,
    group_size: int | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Tensor:
    """Multiplies codes by packed int4 codes and scales the integers once per group.

    Args:
        x_q: [..., K], int8 or uint8, or [..., ceil(K / 128) * 64], uint8, if x_packed.
        operand: the weights, from `prepare_int4` with the same backend.
        w_scale: [N, 1] or [N, G], float32.
        bias: [N], float32, or None.
        in_features: K.
        x_packed: x_q holds two codes a byte.
        x_scale: None (static), or [..., 1] or [..., G], float32.
        x_zero_point: subtracted from the codes of x.
        group_size: channels in a group, if there is more than one.
        activation: None, "gelu", "gelu_tanh" or "relu".

    Returns:
        y: [..., N], out_dtype.
    """
    check_activation(activation)
    name = backend_of(x_q, backend)
    K = in_features
    width = packed_width(K) if x_packed else K
    if x_q.shape[-1] != width:
        raise ValueError(f"x_q must be [..., {width}] for {K} channels, got {list(x_q.shape)}")
    if x_packed:
        x_q = unpack_int4(x_q, K)
    if name == "cpu":
        w = prepare_int4(operand, K, "cpu") if operand.dtype == torch.uint8 else operand
        return int8_linear(
            x_q, w, w_scale, bias, x_scale=x_scale, x_zero_point=x_zero_point,
            group_size=group_size, activation=activation, out_dtype=out_dtype, backend="cpu",
        )  # fmt: skip
    w_q = unpack_int4(restore_int4(operand, K), K)
    y = int8_linear_ref(
        x_q, w_q, w_scale, bias, x_scale=x_scale, x_zero_point=x_zero_point, group_size=group_size
    )
    return activate(y, activation).to(out_dtype)
