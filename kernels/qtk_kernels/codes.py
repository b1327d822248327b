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
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ._launch import cdiv, next_power_of_2, part_launch, row_launch
from .packing import BLOCK, pack_int4, packed_width

TOKEN = -1  # the group size that stands for a whole token in `_rows.py`
EPS = 1e-8  # smallest max |y|: a row of zeros quantizes to zeros, not to nan
BYTE_OFFSET = (
    128  # of uint8 codes of 8 bits: less it they are int8 codes, only the sign bit differs
)

Granularity = str | int


@dataclass(frozen=True)
class Codes:
    """What codes a quantizer writes; checks itself.

    Attributes:
        bits: 2 to 8.
        granularity: "tensor" (static: step and zero point are already in y), "token", or the size
            of a group of channels.
        offset: 0 for int8 codes; 2 ** (bits - 1) for the same codes, moved by as much, in uint8.
            A static grid has it in its zero point.
        packed: two codes a byte, in the layout of `pack_int4`.
        clip: the part of the dynamic range to keep, in (0, 1].

    Raises:
        ValueError: a field is none of these.
    """

    bits: int
    granularity: Granularity = "tensor"
    offset: int = 0
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
        if self.offset not in (0, 2 ** (self.bits - 1)):
            raise ValueError(
                f"offset of {self.bits}-bit codes must be 0 (int8) or {2 ** (self.bits - 1)} "
                f"(uint8), got {self.offset}"
            )
        if self.packed and (self.offset or self.bits > 4):
            raise ValueError(
                f"packed codes have no offset and at most 4 bits, "
                f"got offset {self.offset} and {self.bits} bits"
            )
        if not 0 < self.clip <= 1:
            raise ValueError(f"clip must be in (0, 1], got {self.clip}")

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Worked out once: every launch looks a plan up. Of numbers: a copy may go elsewhere."""
        return hash(tuple(self.numbers))

    @property
    def numbers(self) -> list[float]:
        """The fields as one argument of an operator, exactly."""
        group = (
            self.granularity if isinstance(self.granularity, int) else 0 if self.static else TOKEN
        )
        return [float(n) for n in (self.bits, group, self.offset, self.packed, self.clip)]

    @classmethod
    def of(cls, numbers: Sequence[float]) -> "Codes":
        """Inverts `numbers`."""
        bits, group, offset, packed, clip = numbers
        granularity: Granularity = {0: "tensor", TOKEN: "token"}.get(int(group), int(group))
        return cls(int(bits), granularity, int(offset), bool(packed), clip)

    @property
    def static(self) -> bool:
        return self.granularity == "tensor"

    @property
    def added(self) -> int:
        """The offset, where a quantizer has to add it after rounding."""
        return 0 if self.static else self.offset

    @property
    def qmin(self) -> int:
        """The smallest code before `added`."""
        return self.offset - self.added - 2 ** (self.bits - 1)

    @property
    def qmax(self) -> int:
        """The largest code before `added`."""
        return self.qmin + 2**self.bits - 1

    @property
    def dtype(self) -> torch.dtype:
        return torch.uint8 if self.offset else torch.int8

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
        return _tile(self, M, K)

    def launch_one_part(self, M: int, K: int, at_least: int = 1) -> dict:
        """The same for a kernel that needs its channels in one tensor, of some size."""
        return _one_part(self, M, K, at_least)


def _tile(codes: Codes, M: int, K: int) -> dict:
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


def _one_part(codes: Codes, M: int, K: int, at_least: int) -> dict:
    group, span, lanes = _lanes(codes, K)
    # bytes are written four at a time
    tile = row_launch(M, lanes, max(at_least, span, BLOCK if codes.packed else 4))
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
        "OFFSET": codes.added,
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
    if codes.added:
        y = y.add_(codes.added)
    q = y.to(codes.dtype)
    return (pack_int4(q) if codes.packed else q), scale


def as_int8(q: Tensor) -> Tensor:
    """uint8 codes less BYTE_OFFSET, contiguous; int8 codes as they are."""
    if q.dtype == torch.uint8:
        return (q ^ BYTE_OFFSET).view(torch.int8).contiguous()
    return q


def as_uint8(q: Tensor) -> Tensor:
    """int8 codes plus BYTE_OFFSET; uint8 codes as they are."""
    return q.view(torch.uint8) ^ BYTE_OFFSET if q.dtype == torch.int8 else q


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
