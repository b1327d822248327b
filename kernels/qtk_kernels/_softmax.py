"""Probabilities to codes: what every quantized softmax computes, and its definition.

With t = log2(e) * logit, p = 2**t / sum_j 2**t_j:

kind        code of p                                     value of a code
"float"     p itself                                      p
"uniform"   clamp(round(p * top), 0, top)         code / top
"matthew"   clamp(round(p / step), 0, top)        code * step, with a searched step a head
"log2"      clamp(round(-steps * log2 p), 0, top) 2**(-code / steps), and 0 for top
"code"      the byte of a float8_e5m2             2**(byte // 4 - 15) * (1 + byte % 4 / 4)

with top = 2**bits - 1. "matthew" is APQ-ViT's Matthew-effect preserving quantization, arXiv
2303.14341: an asymmetric uniform grid a head; probabilities being positive, its zero point is the
lowest code. "log2" with one step is FQ-ViT's, arXiv 2111.13824, with two RepQ-ViT's
log-sqrt2, arXiv 2212.08254; here the last code is exactly zero, so that a hidden token weighs
nothing.

"code" with m = 1, 2 or 4 steps an octave never evaluates an exponential:

    byte = (4 / m) * floor(max(fl32(m t + K), 32 m) - 32 m),     K = 62 m + 1/2 - OFFSET[m] - m M

where fl32 is the single rounding of a fused multiply-add. M anchors the row: its exact maximum,
which is then 2**15 without error, or ("grid") the maximum's integer ceiling. With an
integer M a later, larger one moves no code: bytes only lose 4 an octave. `byte` read as e5m2 is
2**15 times the probability but for the normaliser, which is the sum of the codes' own values.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ._lang import jit, tl

KINDS = ("float", "uniform", "matthew", "log2", "code")
LOG2_E = 1.4426950408889634
# Codes are linear between powers of two, where the exponential bends below: 1 + f >= 2**f. Rounding
# this much (of a step) lower makes the mean of code over exponential 1, as it is at the maximum.
OFFSET = {1: 7 / 256, 2: 26 / 256, 4: 57 / 256}
MASKED = -1e30  # the score of a hidden token
LOWEST = -1e15  # no maximum is below: a row that sees nothing must not anchor at MASKED


@dataclass(frozen=True)
class Softmax:
    """How probabilities are represented; checks itself.

    Attributes:
        kind: one of KINDS.
        bits: width of a code of "uniform", "matthew" and "log2".
        steps: steps an octave, of "log2" (1, 2) and "code" (1, 2, 4).
        renormalize: divide by the sum of the quantized probabilities; "code" always does.
    """

    kind: str = "float"
    bits: int = 8
    steps: int = 1
    renormalize: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"softmax must be one of {KINDS}, got {self.kind!r}")
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be 2 to 8, got {self.bits}")
        allowed = {"log2": (1, 2), "code": (1, 2, 4)}.get(self.kind, (1,))
        if self.steps not in allowed:
            raise ValueError(f"steps must be one of {allowed} for {self.kind!r}, got {self.steps}")

    @property
    def top(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    @property
    def uniform(self) -> bool:
        return self.kind in ("uniform", "matthew")

    @property
    def units(self) -> int:
        """Units of the logarithm in an octave."""
        return self.steps if self.kind == "code" else 1


def fma(x: Tensor, y: Tensor | float, z: Tensor) -> Tensor:
    """x * y + z of float32 with one rounding: the product of two float32 is exact in float64."""
    return (x.double() * y + z.double()).float()


def anchored(top: Tensor, steps: int, grid: bool) -> Tensor:
    """K, float32, from a row's largest m t."""
    top = top.clamp(min=LOWEST)
    if grid:
        top = (top / steps).ceil() * steps
    return (62 * steps + 0.5 - OFFSET[steps]) - top


def bytes_of(x: Tensor, steps: int) -> Tensor:
    """e5m2 bytes, uint8, of m t + K."""
    units = x.clamp(min=32.0 * steps).floor() - 32 * steps
    return (units * (4 // steps)).to(torch.uint8)


def probabilities_ref(
    t: Tensor, softmax: Softmax, step: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition of every kind but "code".

    Args:
        t: [..., T], float32, base-2 logits; MASKED where hidden.
        step: broadcast against t, of "matthew".

    Returns:
        values: [..., T], float32: 2**(t - max t), 2**(-code / steps) or codes.
        total: [..., 1], what divides them: the quantized probability is values / total.
    """
    top = t.amax(-1, keepdim=True).clamp(min=LOWEST)
    p = torch.exp2(t - top)  # exactly 0 where hidden
    total = p.sum(-1, keepdim=True)
    total = torch.where(total > 0, total, 1.0)
    if softmax.kind == "float":
        return p, total
    if softmax.kind == "log2":
        k = torch.round(softmax.steps * (torch.log2(total) - (t - top)))
        values = torch.exp2(-k / softmax.steps).masked_fill(k >= softmax.top, 0.0)
        per_value = torch.ones_like(total)
    else:
        step = t.new_full((), 1 / softmax.top) if step is None else step
        values = torch.round(p * (1 / (total * step))).clamp(0, softmax.top)
        per_value = torch.ones_like(total) / step
    return values, values.sum(-1, keepdim=True) if softmax.renormalize else per_value


@jit
def fma_tile(x, y, z, EXACT: tl.constexpr):
    """x * y + z, rounded once; the interpreter has no such instruction, so it goes by float64."""
    if EXACT:
        return (x.to(tl.float64) * y.to(tl.float64) + z.to(tl.float64)).to(tl.float32)
    else:
        return tl.fma(x, y, z)


@jit
def anchor_tile(top, STEPS: tl.constexpr, OFFSET: tl.constexpr):
    """K of a row's largest m t, exact or already an integer number of octaves."""
    return (62 * STEPS + 0.5 - OFFSET) - top


@jit
def code_tile(x, STEPS: tl.constexpr, INTERPRETED: tl.constexpr):
    """e5m2 of m t + K: the integer part of x in [32 m, 64 m) lies in bits 16 to 22 of a float32."""
    bits = tl.maximum(x, 32.0 * STEPS).to(tl.int32, bitcast=True)
    if INTERPRETED:
        byte = ((bits >> 16) & (128 - 4 // STEPS)).to(tl.int8)
    else:  # the third bytes of four numbers in three permutations and one mask
        MASK: tl.constexpr = (
            "0x7c7c7c7c" if STEPS == 1 else ("0x7e7e7e7e" if STEPS == 2 else "0x7f7f7f7f")
        )
        byte = tl.inline_asm_elementwise(
            "{ .reg .b32 a, b; prmt.b32 a, $1, $2, 0x0062; prmt.b32 b, $3, $4, 0x0062; "
            "prmt.b32 a, a, b, 0x5410; and.b32 $0, a, " + MASK + "; }",
            "=r,r,r,r,r", [bits], dtype=tl.int8, is_pure=True, pack=4,
        )  # fmt: skip
    return byte.to(tl.float8e5, bitcast=True)
