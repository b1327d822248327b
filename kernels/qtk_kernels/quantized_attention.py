"""Attention whose two matrix products and softmax are quantized, in one kernel.

    score_ij = sum_d q_id k_jd                            int32 for codes, else float32
    u_ij     = score_ij * k_scale_j                       where k_scale is given
    t_ij     = u_ij * a_i,   a_i = q_scale_i * (scale * log2(e))
    P_ij, L_i = values and their divisor                  see `_softmax.py`; 0 where hidden
    out_id   = v_scale_d * (sum_j P_ij v_jd) * (1 / L_i)  0 for a row that sees nothing

Sentences one after another, without padding (FlashAttention's variable lengths), are `sequences`.

operands of the first product: floats, int8 codes, or packed int4 codes (`pack_heads`); q_scale and
k_scale are per token, per group of tokens, or per head.

operands of the second: P times v, by v's dtype
    float          P rounded to that dtype
    int8           "uniform", "matthew": P's codes as int8, sums in int32; others: P rounded to
                   float16, which "code" and "log2" with one step need not be, and v in it exactly
    float8_e4m3fn  "code", "log2" with one step and up to 4 bits: P as e5m2 bytes

"code": up to WHOLE keys M is the row's exact maximum (one tile holds the row, or its scores are
computed twice), beyond its ceiling, so that one pass over k and v suffices and tiles of any size,
in any order, give the same codes; only float32 additions depend on the order, and those of
2**n (1 + f / 4) that span less than 24 bits do not. m t + K is one rounding of u_ij * (m a_i) + K.
A code that a later maximum pushes below 2**-15 keeps its share, less than 2**-30 of the largest.

B batch, H heads, T tokens, D head size. Source of the idea: FQ-ViT, arXiv 2111.13824, for codes
in the logarithm; that their bytes are fp8 operands, and need no exponential, is this project's.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._attention_kernel import quantized_attention_kernel
from ._attention_ref import WHOLE, expanded, group, quantized_attention_ref, weights_ref
from ._launch import cdiv, next_power_of_2
from ._plan import Plan, broadcast_strides, contiguous_strides, opaque, planned
from ._softmax import LOG2_E, OFFSET, Softmax
from .dispatch import INTERPRETED, backend_of, on_device

ONE_TILE = 256  # keys of a row that a program holds: 128 scores a thread


def pack_heads(q: Tensor) -> Tensor:
    """Two 4-bit codes a byte: [..., D] int8 in [-8, 7] to [..., ceil(D / 2)] uint8.

    The first half of the channels lies in the low nibbles, the second in the high ones.
    """
    low, high = F.pad(q, (0, q.shape[-1] % 2)).view(torch.uint8).chunk(2, -1)
    return low & 15 | high << 4


def attention_tile(
    Tq: int, Tk: int, D: int, one_pass: bool, fp8: bool, row_bytes: int, *, packed: bool = False,
    full_mask: bool = False, rounds: bool = True,
) -> dict[str, int]:  # fmt: skip
    """Rows, keys and warps of a program: a rule, not tuned on a GPU.

    Args:
        D: channels of a head as the kernel holds them, a power of two.
        one_pass: nothing about a whole row has to be known before its codes are.
        fp8: the second product's operands are float8, which are native from 64 rows on.
        row_bytes: of a key and its value together; more leave no shared memory for more keys.
        packed: q and k are int4, which take two products.
        full_mask: every query has a mask of its own, whose addresses take registers.
        rounds: probabilities become codes, which take registers, too.
    """
    float32 = row_bytes >= 8 * D  # in three parts on tensor cores
    rows, warps = 128, 8  # four warps for each 64 rows, or scores would be held twice
    keys = 32 if float32 or full_mask else 128 if one_pass and D <= 64 else 64
    keys = max(min(keys, 32768 // row_bytes), 32)
    if float32 and D > 64 and (rounds or full_mask):
        keys = 16
    whole = max(next_power_of_2(Tk), 32)
    most = ONE_TILE if D <= 64 and not packed else ONE_TILE // 2
    if whole <= most and whole * row_bytes <= 65536 and not (float32 or full_mask):
        keys = whole
    if Tq <= 64 or Tk <= ONE_TILE // 2 or D > 128 or float32:
        rows, warps = 64, 4
    if Tq <= 16 and not fp8:
        rows = 16
    elif float32 and D > 64:
        rows = 32
    alone = keys * row_bytes > 32768 and whole > keys  # does not fit twice
    stages = 1 if alone or row_bytes > 1024 else 2
    return {"BLOCK_M": rows, "BLOCK_N": keys, "num_warps": warps, "num_stages": stages}


class Signature(NamedTuple):
    """What a launch has to know of a tensor."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


Known = Tensor | Signature


def _signature(x: Tensor | None) -> tuple[Any, ...] | None:
    return None if x is None else (x.shape, x.stride(), x.dtype)


def _check_axes(*tensors: Tensor) -> None:
    if any(x.ndim != 4 for x in tensors):
        shapes = ", ".join(str(list(x.shape)) for x in tensors)
        raise ValueError(f"q, k and v must be [B, H, T, D], got {shapes}")


def _check(
    q: Known, k: Known, v: Known, softmax: Softmax, q_scale: Known | None,
    k_scale: Known | None, v_scale: Known | None, step: Known | None, mask: Known | None,
) -> None:  # fmt: skip
    B, H, Tq, width = q.shape
    Tk, D = v.shape[2:]
    packed = q.dtype == torch.uint8
    if packed != (k.dtype == torch.uint8) or (q.dtype == torch.int8) != (k.dtype == torch.int8):
        raise ValueError(f"q and k must be of one kind, got {q.dtype} and {k.dtype}")
    if (
        k.shape != (B, H, Tk, width)
        or v.shape[:2] != (B, H)
        or width != (-(-D // 2) if packed else D)
    ):
        raise ValueError(
            f"q [B, H, Tq, D], k and v [B, H, Tk, D] (q and k ceil(D / 2) wide if packed) do not "
            f"fit: {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    if D > 256:
        raise ValueError(f"heads are at most 256 wide, got {D}")
    for name, x, scale, T in (("q_scale", q, q_scale, Tq), ("k_scale", k, k_scale, Tk)):
        if not x.dtype.is_floating_point and scale is None:
            raise ValueError(f"codes need a scale: give {name} [B, H, G]")
        if scale is not None and (
            len(scale.shape) != 3 or cdiv(T, group(scale.shape, T)) != scale.shape[2]
        ):
            raise ValueError(
                f"{name} must be [B, H, G], G groups of {T} tokens, got {list(scale.shape)}"
            )
    if v_scale is not None and (len(v_scale.shape) != 3 or v_scale.shape[-1] not in (1, D)):
        raise ValueError(f"v_scale must be [B, H, {D}] or [B, H, 1], got {list(v_scale.shape)}")
    if (softmax.kind == "matthew") != (step is not None):
        raise ValueError("step [H] goes with softmax='matthew', and only with it")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, True where a key may be seen, got {mask.dtype}")
    if step is not None and step.shape != (H,):
        raise ValueError(f"step must be [{H}], got {list(step.shape)}")
    if v.dtype == torch.float8_e4m3fn and not (
        softmax.kind == "code"
        or (softmax.kind == "log2" and softmax.steps == 1 and softmax.bits <= 4)
    ):
        raise ValueError(
            "v in float8_e4m3fn goes with softmax 'code', or 'log2' of one step and up to 4 bits"
        )


@planned
def _plan(
    tensors: tuple[Any, ...], kind: tuple[Any, ...], multiplier: float, causal: bool, grid: bool,
    out_dtype: torch.dtype, block_n: int, sentences: int, longest: int,
) -> Plan:  # fmt: skip
    known = [None if x is None else Signature(*x) for x in tensors]
    q, k, v, mask, q_scale, k_scale, v_scale, step = known
    assert q is not None and k is not None and v is not None
    softmax = Softmax(*kind)
    _check(q, k, v, softmax, q_scale, k_scale, v_scale, step, mask)
    (B, H, Tq, width), (Tk, D) = q.shape, v.shape[2:]
    copy = q.stride[3] != 1 or k.stride[3] != 1
    strides = [contiguous_strides(x.shape) if copy else x.stride for x in (q, k)]
    scales = [
        (0, 0, 0) if s is None
        else broadcast_strides(s.shape, s.stride, (B, H, s.shape[2]), "a scale")
        for s in (q_scale, k_scale, v_scale)
    ]  # fmt: skip
    seen: tuple[int, ...] = (0,) * 4
    if mask is not None:
        seen = broadcast_strides(mask.shape, mask.stride, (B, H, Tq, Tk), "mask")
    groups = [1 if s is None else group(s.shape, T) for s, T in ((q_scale, Tq), (k_scale, Tk))]
    result = (B, Tq, H * D)
    if sentences:  # one sentence after the other, in the tiles of padded ones
        B, Tq, Tk = sentences, longest, longest
    fp8 = v.dtype == torch.float8_e4m3fn
    one_pass = grid or softmax.kind == "float"
    BLOCK_W, BLOCK_D = max(next_power_of_2(width), 32), max(next_power_of_2(D), 16)
    tile = attention_tile(
        Tq, Tk, BLOCK_D, one_pass, fp8, BLOCK_W * q.dtype.itemsize + BLOCK_D * v.dtype.itemsize,
        packed=q.dtype == torch.uint8,
        full_mask=seen[2] > 0 or (sentences > 0 and causal),  # as that of padded sentences
        rounds=softmax.kind != "float",
    )  # fmt: skip
    tile["BLOCK_N"] = block_n or tile["BLOCK_N"]
    return Plan(
        copy,
        [(result, out_dtype)],
        (cdiv(Tq, tile["BLOCK_M"]) * B * H,),
        (H, Tq, Tk, D, width, *strides[0][:3], *strides[1][:3], *v.stride, *seen,
         *scales[0], *scales[1], *scales[2], *groups, multiplier),
        {"KIND": "uniform" if softmax.uniform else softmax.kind, "STEPS": softmax.steps,
         "TOP": softmax.top, "OFFSET": OFFSET.get(softmax.steps, 0.0),
         "RENORMALIZE": softmax.renormalize, "ONE_TILE": not grid and Tk <= tile["BLOCK_N"],
         "GRID": grid, "CAUSAL": causal,
         "TAIL": causal or sentences > 0 or mask is not None or Tk % tile["BLOCK_N"] > 0,
         "KEY_MASK": mask is not None and seen[2] == 0, "PACKED": q.dtype == torch.uint8,
         "V_FP8": fp8, "EXACT": INTERPRETED,
         "BLOCK_W": BLOCK_W, "BLOCK_D": BLOCK_D,
         **tile,
         # the definition of codes says where a product and a sum are one
         "enable_fp_fusion": softmax.kind == "float"},
    )  # fmt: skip


def _empty(
    q: Tensor, _k: Any, v: Tensor, _m: Any, _qs: Any, _ks: Any, _vs: Any, _st: Any, *rest: Any
) -> Tensor:
    B, H, Tq, _ = q.shape
    return q.new_empty((B, Tq, H * v.shape[3]), dtype=rest[-2])


@opaque(_empty)
def _launch_quantized_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, q_scale: Tensor | None,
    k_scale: Tensor | None, v_scale: Tensor | None, step: Tensor | None,
    softmax: str, bits: int, steps: int, renormalize: bool, multiplier: float, causal: bool,
    grid: bool, sequences: Tensor | None, longest: int, out_dtype: torch.dtype, block_n: int,
) -> Tensor:  # fmt: skip
    tensors = q, k, v, mask, q_scale, k_scale, v_scale, step
    plan = _plan(
        tuple(map(_signature, tensors)), (softmax, bits, steps, renormalize), multiplier, causal,
        grid, out_dtype, block_n, 0 if sequences is None else len(sequences), longest,
    )  # fmt: skip
    if plan.copy:
        q, k = q.contiguous(), k.contiguous()
    (out,) = plan.empty(q.device)
    with on_device(*tensors, sequences):
        quantized_attention_kernel[plan.grid](
            q, k, v.view(torch.int8) if plan.options["V_FP8"] else v,
            None if mask is None else mask.view(torch.uint8), q_scale, k_scale, v_scale,
            None if step is None else step.contiguous(),
            None if sequences is None else sequences.contiguous(), out,
            *plan.numbers, **plan.options,
        )  # fmt: skip
    return out


def _check_sequences(
    q: Tensor, k: Tensor, mask: Tensor | None, sequences: Tensor | None, longest: int | None
) -> None:
    if (sequences is None) != (longest is None):
        raise ValueError("sequences and longest go together")
    if sequences is None:
        return
    if sequences.dtype != torch.int32 or sequences.ndim != 2 or sequences.shape[1] != 3:
        raise ValueError(
            f"sequences must be int32 [S, 3], got {sequences.dtype} {list(sequences.shape)}"
        )
    if mask is not None or q.shape[0] != 1 or q.shape[2] != k.shape[2]:
        raise ValueError(
            "sequences go with q, k and v of [1, H, N, D] and without a mask, got "
            f"{list(q.shape)}, {list(k.shape)}" + ("" if mask is None else " and a mask")
        )


def _in_sequences_ref(
    q: Tensor, k: Tensor, v: Tensor, q_scale: Tensor | None, k_scale: Tensor | None,
    sequences: Tensor, longest: int, options: dict[str, Any],
) -> Tensor:  # fmt: skip
    """The definition: padded sentences, of whose tokens the results are kept."""
    N = q.shape[2]
    row, first, end = sequences.long().T[..., None]
    place = torch.arange(longest, device=q.device)
    there = (place >= first) & (place < end)  # [S, longest]
    token = torch.where(there, row - first + place, 0)

    def padded(x: Tensor) -> Tensor:
        """[1, H, N, ...] to [S, H, longest, ...], zeros between."""
        raw = x.view(torch.uint8) if x.itemsize == 1 else x  # float8 has no arithmetic
        blank = ~there.view(len(token), 1, longest, *[1] * (x.ndim - 3))
        return raw[0][:, token].transpose(0, 1).masked_fill(blank, 0).view(x.dtype)

    def scales(s: Tensor | None) -> Tensor | None:
        return s if s is None or s.shape[2] == 1 < N else padded(s)

    y = quantized_attention(
        padded(q), padded(k), padded(v), q_scale=scales(q_scale), k_scale=scales(k_scale),
        mask=there[:, None, None], **options,
    )  # fmt: skip
    out = y.new_zeros(1, N, y.shape[-1])
    out[0, token[there]] = y[there]
    return out


def quantized_attention(
    q: Tensor, k: Tensor, v: Tensor, *, softmax: str = "float", bits: int = 8, steps: int = 1,
    renormalize: bool = False, step: Tensor | None = None, q_scale: Tensor | None = None,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None, scale: float | None = None,
    mask: Tensor | None = None, causal: bool = False, grid: bool | None = None,
    sequences: Tensor | None = None, longest: int | None = None,
    out_dtype: torch.dtype = torch.float32, block_n: int | None = None,
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """softmax(q k^T * scale) v, with each of the three quantized as asked.

    Args:
        q, k: [B, H, T, D], floats, int8 codes, or `pack_heads` of 4-bit codes.
        v: [B, H, Tk, D], floats, int8 codes, or float8_e4m3fn; any strides: stored transposed it
            feeds byte-wide tensor cores without a shuffle.
        softmax: "float", "uniform", "matthew", "log2" or "code"; see `_softmax.py`.
        bits: 2 to 8, of "uniform", "matthew" and "log2".
        steps: an octave, 1, 2 or 4 of "code", 1 or 2 of "log2".
        renormalize: divide by the sum of the quantized probabilities, not by the exact one.
        step: [H], the steps of "matthew".
        q_scale, k_scale: [B, H, G] float32 (B and H may be 1), one scale for each of G equal groups
            of tokens: T, 1, or between.
        v_scale: [B, H, D] or [B, H, 1], as those.
        scale: of the logits, D ** -0.5 if not given.
        mask: bool, broadcast against [B, H, Tq, Tk], True where a key may be seen.
        causal: hide keys after the query, the last query seeing the last key.
        grid: anchor "code" at the maximum's ceiling; None: only beyond WHOLE keys.
        sequences: [S, 3] int32: q, k and v are [1, H, N, D], the tokens of S sentences one after
            another, which attend each to their own. Row, first and end: the first token's number,
            and the places [first, end) that the tokens have in a sentence of `longest`. The bits
            are those of such sentences with a mask of their keys (causal: of queries and keys).
        longest: tokens of a padded sentence; goes with sequences.
        out_dtype: of the result.
        block_n: keys of a tile, for tests.

    Returns:
        [B, Tq, H * D] in out_dtype.

    Raises:
        ValueError: shapes, scales or kinds that do not fit.
    """
    _check_axes(q, k, v)
    _check_sequences(q, k, mask, sequences, longest)
    Tk, D = v.shape[2] if longest is None else longest, v.shape[3]
    grid = softmax == "code" and (Tk > WHOLE if grid is None else grid)
    multiplier = (
        (D**-0.5 if scale is None else scale) * LOG2_E * (steps if softmax == "code" else 1)
    )
    if backend_of(q, backend) == "triton" and q.numel() and Tk:
        return _launch_quantized_attention(
            q, k, v, mask, q_scale, k_scale, v_scale, step,
            softmax, bits, steps, renormalize, multiplier, causal, grid, sequences, longest or 0,
            out_dtype, block_n or 0,
        )  # fmt: skip
    if sequences is not None:
        options: dict[str, Any] = {
            "softmax": softmax, "bits": bits, "steps": steps, "renormalize": renormalize,
            "step": step, "v_scale": v_scale, "scale": scale, "causal": causal, "grid": grid,
            "out_dtype": out_dtype, "backend": backend,
        }  # fmt: skip
        return _in_sequences_ref(q, k, v, q_scale, k_scale, sequences, Tk, options)
    kind = Softmax(softmax, bits, steps, renormalize)
    _check(q, k, v, kind, q_scale, k_scale, v_scale, step, mask)
    a, k_scale, mask = expanded(q, k, multiplier, q_scale, k_scale, mask, causal)
    return quantized_attention_ref(q, k, v, kind, a, k_scale, v_scale, mask, step, grid).to(
        out_dtype
    )


def attention_weights(
    q: Tensor, k: Tensor, v: Tensor, *, softmax: str = "float", bits: int = 8, steps: int = 1,
    renormalize: bool = False, step: Tensor | None = None, q_scale: Tensor | None = None,
    k_scale: Tensor | None = None, scale: float | None = None, mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:  # fmt: skip
    """What `quantized_attention` multiplies v with, [B, H, Tq, Tk] float32, by the definition."""
    _check_axes(q, k, v)
    kind = Softmax(softmax, bits, steps, renormalize)
    _check(q, k, v, kind, q_scale, k_scale, None, step, None)
    multiplier = (v.shape[3] ** -0.5 if scale is None else scale) * LOG2_E * kind.units
    a, k_scale, mask = expanded(q, k, multiplier, q_scale, k_scale, mask, causal)
    P, L = weights_ref(q, k, v, kind, a, k_scale, mask, step, k.shape[2] > WHOLE)
    return P / torch.where(L > 0, L, 1.0)
