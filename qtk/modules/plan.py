"""What a call of an integer linear needs, worked out once when it is prepared, and the call."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qtk.errors import BackendError
from qtk.modules.grid import Affine, InputGrid
from qtk.scheme import Format
from qtk_kernels.codes import Codes
from qtk_kernels.dispatch import backend_of
from qtk_kernels.few_rows import MOST_ROWS, FewRows, few_rows_linear, prepare_few_rows
from qtk_kernels.int4_linear import (
    int4_linear,
    int4_linear_kernel_name,
    prepare_int4,
    restore_int4,
)
from qtk_kernels.int8_linear import (
    fold_zero_point,
    int8_linear,
    int8_linear_kernel_name,
    prepare_int8,
    restore_int8,
)
from qtk_kernels.onednn import onednn_linear
from qtk_kernels.packing import pack_int4, unpack_int4
from qtk_kernels.weight_only_linear import (
    prepare_weight_only,
    weight_only_kernel_name,
    weight_only_linear,
)


@dataclass(frozen=True)
class Plan:
    """What a call needs, worked out once: folded vectors and the weight as its kernel reads it.

    Attributes:
        operand: the weight, in the kernel's layout; None while it is part of a joined one.
        before: x * multiplier + offset before the rotation, where there is one.
        multiplier, offset: [K] float32; q = round(x * multiplier + offset).
        weight_scale: [N, G], times the input's step when that is static.
        weight_zero_point: [N, G] float32, None for symmetric weights.
        bias: [N] with the input's zero point folded in.
        codes: what the quantizer of the input writes, None where it stays floating point.
        x_zero_point: what a dynamic kernel subtracts from a code.
        kernel: the name of what runs, for the summary.
        onednn: whether that is oneDNN, which needs none of the kernels' checks and choices.
        few_rows: four-bit weights once more, for a CPU's kernel for few tokens.
        w: the weight's grid.
        in_features: K.
    """

    w: Format
    in_features: int
    backend: str
    operand: Tensor | None
    before: Affine | None
    multiplier: Tensor | None
    offset: Tensor | None
    weight_scale: Tensor
    bias: Tensor | None
    codes: Codes | None
    x_zero_point: int
    kernel: str
    onednn: bool = False
    few_rows: FewRows | None = None
    weight_zero_point: Tensor | None = None


def is_int4(w: Format) -> bool:
    """Codes of four bits and less run in the packed int4 kernels, wider ones in int8's."""
    return w.bits <= 4


def make_plan(
    codes: Tensor, weight_scale: Tensor, weight_zero_point: Tensor | None, bias: Tensor | None,
    grid: InputGrid, w: Format, backend: str,
) -> Plan:  # fmt: skip
    """Folds step, zero point, shift and channel scale into the vectors that the kernels read.

    Args:
        codes: [N, K] int8.
        weight_scale, weight_zero_point, bias: as in `QuantLinear`.
        grid: of the input.
        w: of the weight.
        backend: "auto", "triton", "cpu" or "reference".
    """
    backend = resolve_backend(weight_scale, backend)
    if grid.fmt is None:
        return _weight_only(codes, weight_scale, weight_zero_point, bias, grid, w, backend)
    K = codes.shape[1]
    code_offset = 2 ** (grid.fmt.bits - 1) if backend == "cpu" else 0
    before, affine = grid.affines(code_offset)
    multiplier, offset = affine or (None, None)
    groups, x_zero_point = weight_scale.shape[1], code_offset
    if grid.scale is not None and grid.zero_point is not None:
        weight_scale, x_zero_point = weight_scale * grid.scale, 0
        zero_point = int(grid.zero_point) + code_offset
        bias = fold_zero_point(bias, codes, weight_scale, 1.0, zero_point, w.group_size)
        assert multiplier is not None and offset is not None
        multiplier, offset = multiplier.expand(K).contiguous(), offset.expand(K).contiguous()
    operand, name = prepare_operand(codes, w, groups, backend)
    written = Codes(grid.fmt.bits, grid.fmt.granularity, code_offset, clip=grid.clip)
    return Plan(
        w, K, backend, operand, before, multiplier, offset, weight_scale, bias, written,
        x_zero_point, name, onednn=operand.is_mkldnn,
    )  # fmt: skip


def _weight_only(
    codes: Tensor, weight_scale: Tensor, weight_zero_point: Tensor | None, bias: Tensor | None,
    grid: InputGrid, w: Format, backend: str,
) -> Plan:  # fmt: skip
    K, packed, bits = codes.shape[1], is_int4(w), 4 if is_int4(w) else 8
    weight = pack_int4(codes) if packed else codes
    operand = prepare_weight_only(weight, bits=bits, in_features=K, backend=backend)
    name = weight_only_kernel_name(operand, bits=bits, backend=backend)
    zero_point = None if weight_zero_point is None else weight_zero_point.float()
    few_rows = None
    if backend == "cpu" and packed:
        few_rows = prepare_few_rows(codes, weight_scale, zero_point, w.group_size)
    if few_rows is not None:
        name = f"aten int4 in bfloat16 up to {MOST_ROWS} tokens, else {name}"
    before, affine = grid.affines()
    multiplier, offset = affine or (None, None)
    return Plan(
        w, K, backend, operand, before, multiplier, offset, weight_scale, bias, codes=None,
        x_zero_point=0, kernel=name, few_rows=few_rows, weight_zero_point=zero_point,
    )  # fmt: skip


def multiply(
    q: Tensor, scale: Tensor | None, plan: Plan, out_dtype: torch.dtype,
    activation: str | None = None,
) -> Tensor:  # fmt: skip
    """Codes [..., K], or floats for weight-only plans, times the operand -> [..., N]."""
    assert plan.operand is not None
    if plan.few_rows is not None and q.shape[:-1].numel() <= MOST_ROWS:
        assert activation is None
        return few_rows_linear(q, plan.few_rows, plan.bias)
    group_size, operand = plan.w.group_size, (plan.operand, plan.weight_scale, plan.bias)
    if q.is_floating_point():
        assert activation is None
        return weight_only_linear(
            q, *operand, w_zero_point=plan.weight_zero_point, bits=4 if is_int4(plan.w) else 8,
            in_features=plan.in_features, group_size=group_size, backend=plan.backend,
        )  # fmt: skip
    if plan.onednn:
        return onednn_linear(
            q, *operand, plan.x_zero_point, x_scale=scale, activation=activation,
            out_dtype=out_dtype,
        )  # fmt: skip
    if is_int4(plan.w):
        return int4_linear(
            q, *operand, in_features=plan.in_features, x_scale=scale,
            x_zero_point=plan.x_zero_point, group_size=group_size, activation=activation,
            out_dtype=out_dtype, backend=plan.backend,
        )  # fmt: skip
    return int8_linear(
        q, *operand, x_scale=scale, x_zero_point=plan.x_zero_point, group_size=group_size,
        activation=activation, out_dtype=out_dtype, backend=plan.backend,
    )  # fmt: skip


def prepare_operand(codes: Tensor, w: Format, groups: int, backend: str) -> tuple[Tensor, str]:
    """The codes in the layout of the kernel that will read them, and that kernel's name."""
    K = codes.shape[1]
    if backend == "cpu" and groups > 1:
        operand = codes.contiguous()  # oneDNN has one scale a row: groups run in float32 chunks
    elif is_int4(w):
        operand = prepare_int4(pack_int4(codes), K, backend)
    else:
        operand = prepare_int8(codes, backend)
    kernel_name = int4_linear_kernel_name if is_int4(w) else int8_linear_kernel_name
    return operand, kernel_name(operand, groups=groups, backend=backend)


def restore_codes(operand: Tensor, w: Format, K: int) -> Tensor:
    """An integer kernel's operand -> codes [N, K] int8."""
    return unpack_int4(restore_int4(operand, K), K) if is_int4(w) else restore_int8(operand)


def resolve_backend(x: Tensor, backend: str) -> str:
    """What runs on x's device when `backend` is asked for.

    Raises:
        BackendError: there is no such backend, or it cannot run there.
    """
    try:
        return backend_of(x, backend)
    except ValueError as error:
        raise BackendError(f"{error}; backend='auto' chooses by device") from None
