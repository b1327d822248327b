"""Tile sizes, warps and stages, from rules instead of a search.

Nothing here was tuned on a GPU: the rules keep registers and shared memory within every device
from sm_80 on, which `benchmarks/compiler` checks by compiling. `qtk tune` measures tiles of matrix
products on a GPU and writes `tuned/<card>.json`, which then comes first:

    {"device": name, "capability": [major, minor], "processors": number,
     "versions": {"torch": ..., "triton": ...},
     "entries": [{"kernel": "int8_linear", "M": 16, "N": 4096, "K": 4096,
                  "tile": {"BLOCK_M": ..., ..., "num_stages": ...}, "us": 7.1, "before_us": 8.0,
                  "first_call_s": 1.2}, ...]}

A tile of null: the product of one or two tokens that has none (`_gemv.py`) was faster than any.
No table is shipped that was not measured.
"""

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from math import log2
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ._plan import forget, planned

MAX_ROW = 8192  # channels that one program holds in registers; longer rows are walked
SMS = 128  # programs that fill a large GPU
TUNED = Path(__file__).parent / "tuned"
FAR = 2.0  # octaves of M, N and K together beyond which a measurement says nothing
MAX_SPLITS = 16  # parts of a sum over K


class Card(NamedTuple):
    """What tiles are measured for."""

    name: str
    capability: tuple[int, int]
    processors: int

    @property
    def architecture(self) -> str:
        return "sm_{}{}".format(*self.capability)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def row_launch(M: int, K: int, at_least: int = 1) -> dict[str, int]:
    """Rows and channels of a program of a row kernel: 32 values a thread, rows to fill a warp.

    Args:
        M: rows.
        K: channels.
        at_least: the smallest BLOCK_K, a power of two (a group, or a block of packed codes).
    """
    whole = next_power_of_2(K)
    # a walk over a row keeps more alive than one load does: half the block spills nothing
    BLOCK_K = max(whole if whole <= MAX_ROW else MAX_ROW // 2, at_least)
    rows = min(max(4096 // BLOCK_K, 1), 16, next_power_of_2(cdiv(M, SMS)))
    warps = min(max(rows * BLOCK_K // 1024, 1), 16)
    return {"ROWS": rows, "BLOCK_K": BLOCK_K, "num_warps": warps}


def part_launch(M: int, lanes: int, unit: int, halves: bool) -> dict[str, int]:
    """Rows, parts and lanes of a part of a program of `_rows.py`: the parts that idle least.

    A warp holds whole rows where it can, which then need no barrier, 16 bytes a load.

    Args:
        M: rows.
        lanes: of a row.
        unit: the smallest part, a power of two.
        halves: parts go in pairs.
    """
    if lanes > MAX_ROW:  # a walk in equal steps
        lanes = cdiv(lanes, cdiv(lanes, MAX_ROW // 2))
    choices = [2, 4, 6, 8] if halves else [1, 2, 3, 4, 5, 6, 7, 8]
    sizes = {n: max(next_power_of_2(cdiv(lanes, n)), unit) for n in choices}
    few = 2 if halves else 4
    parts = min(choices, key=lambda n: (n * sizes[n], abs(n - few)))
    block = parts * sizes[parts]
    rows = max(1 << (1024 // block).bit_length() >> 1, 256 // sizes[parts])
    rows = max(min(rows, next_power_of_2(cdiv(M, 4 * SMS))), 1)
    warps = min(next_power_of_2(cdiv(rows * block, 1024)), max(rows * sizes[parts] // 256, 1), 16)
    return {"ROWS": rows, "PARTS": parts, "PART": sizes[parts], "num_warps": warps}


def dot_width(group_size: int) -> int:
    """Channels of one int8 dot product: the widest that groups are a multiple of.

    Other groups take dot products of their own, with a masked tail.
    """
    widths = [width for width in (128, 64, 32) if group_size % width == 0]
    return widths[0] if widths else min(max(next_power_of_2(group_size), 32), 128)


def steps_of(K: int, group: int, block_k: int) -> int:
    """Dot products along K: whole blocks, or blocks of every group where groups end inside one."""
    if group % block_k == 0:
        return cdiv(K, block_k)
    return cdiv(K, group) * cdiv(group, block_k)


def packed_steps(K: int, size: int, width: int) -> tuple[int, int]:
    """Bytes of a dot product over packed weights [N, width], and how many there are along K."""
    if size < K and size % 32:
        return 64, cdiv(K, 64) * ((62 + size) // size + 1)  # as `segment_of` counts them
    bytes_ = min(dot_width(size), 64) if size < K else 64
    return bytes_, width // bytes_


def gemm_launch(
    kernel: str,
    M: int,
    N: int,
    K: int,
    *,
    device: torch.device | None = None,
    grouped: bool,
    weight_bits: int = 8,
    computed_weights: bool,
    computed_tokens: bool = False,
    wide: bool = False,
    heavy: bool = False,
) -> dict[str, Any]:
    """Tiles of a matrix product of M tokens and N output channels: measured, else by rule.

    Args:
        kernel: name of the op, with "grouped" after it in the tables where that applies.
        device: whose table to read.
        grouped: there are two accumulators, one for a group and one for all of them.
        weight_bits: of a stored weight.
        computed_weights: the kernel computes the weight operand (unpacks it) in registers. Two
            warps then keep it on mma.sync when it is the left operand: left operands that are
            computed in registers meet a defect of ptxas before 13.3 on wgmma.
        computed_tokens: the same for the activations.
        wide: the activations are floats, which take more shared memory: fewer stages.
        heavy: operands fill the registers, because they come a byte at a time (rows that do not
            begin on 16 bytes) or as float32, in several parts: smaller tiles, or more threads.
    """
    if _forced is not None:
        return _forced
    tile = measured(kernel, M, N, K, device, grouped=grouped)
    if tile is not None:
        return tile
    if heavy and not computed_tokens:
        tile = _heavy_rule(M, computed_weights)
    else:
        tile = _rule(M, N, grouped, computed_weights, computed_tokens, wide)
    return {**tile, "SPLIT_K": _splits(M, N, K, weight_bits, tile)}


def measured(
    kernel: str, M: int, N: int, K: int, device: torch.device | None, *, grouped: bool
) -> dict[str, Any] | None:
    """The tile that was measured on this card for such a product, or None."""
    if device is None or device.type != "cuda":
        return None
    return nearest(f"{kernel} grouped" if grouped else kernel, M, N, K, card_of(device))


_forced: dict[str, Any] | None = None


def is_forced() -> bool:
    """Whether `use_tile` says which tile to take."""
    return _forced is not None


@contextmanager
def use_tile(tile: dict[str, Any]) -> Iterator[None]:
    """Gives every matrix product inside a `with` block this tile: for measuring."""
    global _forced
    before, _forced = _forced, tile
    forget()
    try:
        yield
    finally:
        _forced = before
        forget()


def _rule(
    M: int, N: int, grouped: bool, computed_weights: bool, computed_tokens: bool, wide: bool
) -> dict[str, Any]:
    """With up to 32 tokens the weights take the side of 64 that Hopper's tensor cores want.

    In groups they take it wherever they come from memory: a thread then needs two scales of theirs.
    """
    if computed_tokens and M > 16:  # below 64 rows, and with two warps, there is no wgmma
        low = grouped or M <= 32
        return _tiles(32, 128, False, 4, 3) if low else _tiles(64, 64, False, 2, 3)
    if M <= 32:
        return _tiles(16 if M <= 16 else 32, 64, True, 2 if computed_weights else 4, 4)
    swap = grouped and not computed_weights
    if cdiv(M, 128) * cdiv(N, 128) < SMS:
        return _tiles(64, 64, swap, 4, 3)
    if swap:
        return _tiles(64, 128, True, 8, 3)
    return _tiles(128, 64 if grouped else 128, False, 8, 2 if wide else 3)


def _heavy_rule(M: int, computed_weights: bool) -> dict[str, Any]:
    """As `_rule`, for operands that fill the registers."""
    few = 16 if M <= 16 else 32
    if computed_weights:
        return _tiles(few, 32, True, 2, 3) if M <= 32 else _tiles(64, 32, False, 4, 2)
    return _tiles(few, 64, True, 4 if M <= 16 else 8, 3) if M <= 32 else _tiles(64, 64, False, 8, 3)


def _splits(M: int, N: int, K: int, weight_bits: int, tile: dict[str, Any]) -> int:
    """Parts of the sum over K, of four blocks of 128 channels at least.

    Up to 64 tokens four programs a processor, as long as all parts together move (8 bytes for each
    of M N values) at most a quarter of the bytes of the weights. Beyond, one program a processor:
    their parts are a tile each, 2 MB in all, which a cache holds.
    """
    tiles = cdiv(M, tile["BLOCK_M"]) * cdiv(N, tile["BLOCK_N"])
    few = min(4 * SMS // tiles, K * weight_bits // (256 * M))
    most = min(few if M <= 64 else SMS // tiles, K // 512, MAX_SPLITS)
    return 1 << max(most, 1).bit_length() - 1


def _tiles(block_m: int, block_n: int, swap: bool, warps: int, stages: int) -> dict[str, Any]:
    return {
        "BLOCK_M": block_m, "BLOCK_N": block_n, "GROUP_M": 8, "SWAP": swap,
        "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


@planned
def nearest(kernel: str, M: int, N: int, K: int, card: Card) -> dict[str, Any] | None:
    """The tile measured for the nearest shape on such a card, or None if there is none near."""

    def distance(entry: dict[str, Any]) -> float:
        sizes = ((entry["M"], M), (entry["N"], N), (entry["K"], K))
        return sum(abs(log2(a / max(b, 1))) for a, b in sizes)

    entries = [entry for entry in _table(card) if entry["kernel"] == kernel]
    best = min(entries, key=distance, default=None)
    return best["tile"] if best is not None and distance(best) <= FAR else None


@planned
def _table(card: Card) -> list[dict[str, Any]]:
    """What was measured on such a card, else on the first of its capability, which is logged."""
    path = table_path(card)
    if path.exists():
        return read_table(path)["entries"]
    for other in sorted(path.parent.glob(f"{card.architecture}_*.json")):
        logging.getLogger(__name__).warning(
            "no tiles were measured on %s: using those of %s; `qtk tune` measures", card.name,
            other.stem,
        )  # fmt: skip
        return read_table(other)["entries"]
    return []


def table_path(card: Card, folder: Path | None = None) -> Path:
    """An H100 and an H200, or two with another number of processors, want other tiles."""
    name = re.sub(r"[^a-z0-9]+", "_", card.name.lower()).strip("_")
    return (folder or TUNED) / f"{card.architecture}_{card.processors}_{name}.json"


TILE = {
    "BLOCK_M": (16, 32, 64, 128, 256), "BLOCK_N": (16, 32, 64, 128, 256), "GROUP_M": range(1, 65),
    "SWAP": (False, True), "SPLIT_K": range(1, MAX_SPLITS + 1), "num_warps": (1, 2, 4, 8, 16),
    "num_stages": range(1, 8),
}  # fmt: skip


def read_table(path: Path) -> dict[str, Any]:
    """A table of measured tiles; raises ValueError where a kernel could not run what it says."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        for entry in table["entries"]:
            tile = entry["tile"] or {}
            wrong = {name: value for name, value in tile.items() if value not in TILE[name]}
            if entry["tile"] is not None and (wrong or tile.keys() != TILE.keys()):
                raise ValueError(f"tile {tile}")
            sizes = [entry[name] for name in "MNK"]
            if not all(isinstance(n, int) and n > 0 for n in sizes) or not entry["us"] > 0:
                raise ValueError(f"entry {entry}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no table of tiles ({type(error).__name__}: {error}): "
            "delete it, or let `qtk tune` write it"
        ) from error
    return table


@cache
def card_of(device: torch.device) -> Card:
    found = torch.cuda.get_device_properties(device)
    return Card(found.name, (found.major, found.minor), found.multi_processor_count)
