"""Images as PNG: a contact sheet, in a file or inside a page."""

import base64
import struct
import zlib
from collections.abc import Sequence
from html import escape
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from qtk import integrity

GAP = 2  # pixels between images


def sheet(lines: Sequence[Tensor], factor: int = 1) -> Tensor:
    """Lines of images [n, 3, H, W] in [0, 1], one size, on white -> [3, H', W'].

    Args:
        factor: how many pixels stand for one.
    """
    longest = max(map(len, lines))
    rows = []
    for images in lines:
        large = images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
        framed = F.pad(large, (GAP, GAP, GAP, GAP), value=1.0)
        row = torch.cat(list(framed), -1)
        rows.append(F.pad(row, (0, (longest - len(images)) * framed.shape[-1]), value=1.0))
    return torch.cat(rows, -2)


def png(image: Tensor) -> bytes:
    """[3, H, W] in [0, 1] -> a file's bytes, 8 bits a channel."""
    pixels = (image * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous()
    height, width, _ = pixels.shape
    lines = b"".join(b"\0" + row.numpy().tobytes() for row in pixels)  # 0: unfiltered
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )


def write(image: Tensor, file: str | Path) -> None:
    """Writes [3, H, W] in [0, 1] as PNG, whole or not at all."""
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(png(image))
    integrity.put(part, path)


def inline(image: Tensor, words: str) -> str:
    """An <img> that holds [3, H, W] itself; `words` for those who do not see it."""
    data = base64.b64encode(png(image)).decode("ascii")
    return f'<img src="data:image/png;base64,{data}" alt="{escape(words)}">'
