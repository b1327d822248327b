"""Float to codes: the output that every quantizing op shares, and its definition.

granularity   scale                              codes
"tensor"      none: step and zero point are      round(y) clamped to the whole grid,
              already part of y                  [-qmax - 1, qmax] or [0, 2**bits - 1]
"token"       max_k |y| * clip / qmax  [..., 1]  round(y / scale) clamped to [-qmax - 1, qmax],
group size    the same per group       [..., G]  plus 2**(bits-1) if unsigned

with qmax = 2 ** (bits - 1) - 1 and rounding to nearest even. The dynamic grids have no zero point;
where they clip, negative values keep one code more. G = ceil(K / group_size); the last group may be
short.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _launch
from ._int4 import BLOCK, pack_int4, packed_width
from ._launch import cdiv, next_power_of_2, part_launch, row_launch

TOKEN = -1  # the group size that stands for a whole token in `_rows.py`
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
        return 0 if self.static and not self.signed else -(2 ** (self.bits - 1))

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

    def packs_apart(self, K: int) -> bool:
        """Groups of another size than a power of two end inside bytes: packed by a pass of its own.

        A kernel would move most nibbles between threads.
        """
        group = self.group_size(K)
        return self.packed and not self.static and group < K and group & (group - 1) > 0

    def written(self, K: int) -> "Codes":
        """What a kernel writes: these codes, but for the packing that is a pass of its own."""
        return replace(self, packed=False) if self.packs_apart(K) else self

    def launch(self, M: int, K: int) -> dict:
        """The parameters of a kernel of `_rows.py` that writes these codes."""
        return _tile(self, M, K, _launch.SMS)

    def launch_one_part(self, M: int, K: int, at_least: int = 1) -> dict:
        """The same for a kernel that needs its channels in one tensor, of some size."""
        return _one_part(self, M, K, at_least, _launch.SMS)


@cache
def _tile(codes: Codes, M: int, K: int, sms: int) -> dict:
    group, span, lanes = _lanes(codes, K)
    # a part holds whole groups, two parts whole blocks of packed codes
    unit = max(64, span // 2) if codes.packed else max(128, span)
    tile = part_launch(M, lanes, unit, codes.packed)
    block = tile["PART"] * tile["PARTS"]
    channels = block // span * group if group > 0 else block
    return {
        **_grid(codes), "GROUP": group, "SPAN": span if group > 0 else group, **tile,
        "FULL": channels == block and K % channels == 0,
    }  # fmt: skip


@cache
def _one_part(codes: Codes, M: int, K: int, at_least: int, sms: int) -> dict:
    group, span, lanes = _lanes(codes, K)
    tile = row_launch(M, lanes, max(at_least, span, BLOCK if codes.packed else 1))
    if group < 1:
        group = span = tile["BLOCK_K"] if group else 0
    return {**_grid(codes), "GROUP": group, "SPAN": span, **tile}


def _lanes(codes: Codes, K: int) -> tuple[int, int, int]:
    """Channels that share a scale (0 if static, TOKEN if all do), lanes of those, and of a row."""
    group = codes.group_size(K)
    if codes.static or group >= K:
        return 0 if codes.static else TOKEN, 1, K
    span = next_power_of_2(group)
    return group, span, cdiv(K, group) * span


def _grid(codes: Codes) -> dict:
    return {
        "QMIN": codes.qmin, "QMAX": codes.qmax,
        "SHIFT": 0 if codes.static or codes.signed else 2 ** (codes.bits - 1),
        "PACKED": codes.packed,
    }  # fmt: skip


def channels_of(tile: dict) -> int:
    """Channels in one tile of `Codes.launch`, without idle lanes."""
    lanes = tile["BLOCK_K"] if "BLOCK_K" in tile else tile["PART"] * tile["PARTS"]
    return lanes if tile["GROUP"] == tile["SPAN"] else lanes // tile["SPAN"] * tile["GROUP"]


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
