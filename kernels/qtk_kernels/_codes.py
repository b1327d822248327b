"""Float to codes: the output that every quantizing op shares, and its definition.

granularity   scale                              codes
"tensor"      none: step and zero point are      round(y) clamped to the whole grid,
              already part of y                  [-2**(bits-1), 2**(bits-1) - 1] or [0, 2**bits - 1]
"token"       max_k |y| * clip / qmax  [..., 1]  round(y / scale) clamped to [-qmax, qmax],
group size    the same per group       [..., G]  plus 2**(bits-1) if unsigned

with qmax = 2 ** (bits - 1) - 1 and rounding to nearest even. The dynamic grids are symmetric: the
most negative code is never used. G = ceil(K / group_size); the last group may be short.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _launch
from ._int4 import BLOCK, pack_int4, packed_width
from ._launch import cdiv, next_power_of_2, row_launch

EPS = 1e-8  # smallest max |y|: a row of zeros quantizes to zeros, not to nan

Granularity = str | int


@dataclass(frozen=True)
class Codes:
    """What codes to write; checks itself."""

    bits: int
    granularity: Granularity = "tensor"
    signed: bool = True
    packed: bool = False
    clip: float = 1.0

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be 2 to 8, got {self.bits}")
        if self.granularity not in ("tensor", "token") and not (
            isinstance(self.granularity, int) and self.granularity > 0
        ):
            raise ValueError(
                f"granularity must be 'tensor', 'token' or a group size, got {self.granularity!r}"
            )
        if self.packed and not (self.signed and self.bits <= 4):
            raise ValueError(
                f"packed codes are signed and at most 4 bits wide, "
                f"got {self.bits} bits, {'signed' if self.signed else 'unsigned'}"
            )
        if not 0 < self.clip <= 1:
            raise ValueError(f"clip must be in (0, 1], got {self.clip}")

    @classmethod
    def of(cls, bits: int, granularity: str, signed: bool, packed: bool, clip: float) -> "Codes":
        """As ops spell them: a group size is a number in a string."""
        size = granularity.lstrip("-").isdigit()
        return cls(bits, int(granularity) if size else granularity, signed, packed, clip)

    @property
    def static(self) -> bool:
        return self.granularity == "tensor"

    @property
    def qmax(self) -> int:
        """The largest code, before the offset of unsigned dynamic codes."""
        return 2**self.bits - 1 if self.static and not self.signed else 2 ** (self.bits - 1) - 1

    @property
    def qmin(self) -> int:
        """The smallest code, before the offset of unsigned dynamic codes."""
        if self.static:
            return -(2 ** (self.bits - 1)) if self.signed else 0
        return -self.qmax

    @property
    def dtype(self) -> torch.dtype:
        return torch.int8 if self.signed else torch.uint8

    def group_size(self, K: int) -> int:
        """Channels that share a scale."""
        return self.granularity if isinstance(self.granularity, int) else max(K, 1)

    def results(self, shape: Sequence[int]) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of the codes, and of the scale if there is one, for x of `shape`."""
        *leading, K = shape
        width = packed_width(K) if self.packed else K
        q = (*leading, width), torch.uint8 if self.packed else self.dtype
        if self.static:
            return [q]
        return [q, ((*leading, -(-K // self.group_size(K))), torch.float32)]

    def empty(self, x: Tensor) -> list[Tensor]:
        """Uninitialized codes, and scale if there is one, for x [..., K]."""
        return [x.new_empty(shape, dtype=dtype) for shape, dtype in self.results(x.shape)]

    def launch(self, M: int, K: int, at_least: int = 1) -> dict:
        """The parameters of a row kernel that writes these codes, in tiles of some channels.

        A tile holds whole groups, each in SPAN lanes, and whole blocks if the codes are packed.
        """
        return _tile(self, M, K, at_least, _launch.SMS)


@cache
def _tile(codes: Codes, M: int, K: int, at_least: int, sms: int) -> dict:
    group = codes.group_size(K)
    one = codes.static or group >= K
    span = 1 if one else next_power_of_2(group)
    groups = 1 if one else cdiv(K, group)
    lanes = span
    if codes.packed and span != group and not one:
        lanes *= min(BLOCK // gcd(BLOCK, group), next_power_of_2(groups))
    at_least = max(at_least, lanes, BLOCK if codes.packed else 1)
    tile = row_launch(M, K if one else groups * span, at_least)
    spans = {"GROUP": group, "SPAN": span}
    if one:
        spans = dict.fromkeys(spans, 0 if codes.static else tile["BLOCK_K"])
    return {
        **spans, "QMIN": codes.qmin, "QMAX": codes.qmax,
        "SHIFT": 0 if codes.static or codes.signed else 2 ** (codes.bits - 1),
        "PACKED": codes.packed, **tile,
    }  # fmt: skip


def channels_of(tile: dict) -> int:
    """Channels in one tile of `Codes.launch`, without idle lanes."""
    if tile["GROUP"] == tile["SPAN"]:
        return tile["BLOCK_K"]
    return tile["BLOCK_K"] // tile["SPAN"] * tile["GROUP"]


def quantize_ref(y: Tensor, codes: Codes) -> tuple[Tensor, Tensor | None]:
    """The definition. Overwrites `y`.

    Args:
        y: [..., K], float32.
        codes: what to write.

    Returns:
        q: [..., K], int8 or uint8, or [..., ceil(K / 128) * 64] if packed.
        scale: None, or [..., 1] or [..., G], float32.
    """
    scale = None
    if not codes.static:
        K = y.shape[-1]
        group_size = codes.group_size(K)
        groups = F.pad(y, (0, -K % group_size)).unflatten(-1, (-1, group_size))  # [..., G, g]
        limit = groups.abs().amax(-1).clamp_(min=EPS).mul_(codes.clip)  # [..., G]
        qmax = limit.new_full((), codes.qmax)  # a tensor, because number / tensor is no division
        y = (groups * (qmax / limit).unsqueeze(-1)).flatten(-2)[..., :K]
        scale = limit / qmax
    y = y.round_().clamp_(codes.qmin, codes.qmax)
    if not codes.static and not codes.signed:
        y = y.add_(2 ** (codes.bits - 1))
    q = y.to(codes.dtype)
    return (pack_int4(q) if codes.packed else q), scale


def check_channels(shape: Sequence[int], **vectors: Sequence[int] | None) -> None:
    """Raises unless the shape of every vector is None or (K,), for x of `shape`."""
    K = shape[-1]
    for name, vector in vectors.items():
        if vector is not None and tuple(vector) != (K,):
            raise ValueError(f"{name} must be [{K}] for x {list(shape)}, got {list(vector)}")


def group_size_of(K: int, G: int, group_size: int | None) -> int:
    """Channels in each of G groups; raises unless `group_size` cuts K channels into G."""
    if G == 1:
        return max(K, 1)
    if group_size is None or -(-K // group_size) != G:
        raise ValueError(
            f"scales with {G} groups over {K} channels need group_size with "
            f"ceil({K} / group_size) = {G}, got {group_size}"
        )
    return group_size


def scale_strides(shape: Sequence[int] | None) -> tuple[int, int]:
    """Steps from row to row and from group to group; 0 from a single group to the next."""
    if shape is None:
        return 0, 0
    G = shape[-1]
    return G, int(G > 1)
