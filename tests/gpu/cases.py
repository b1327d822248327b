"""What the cases of a check are drawn from: sizes, dtypes and layouts in memory."""

import random

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# on a GPU some that take several programs, the largest tiles, and sums split among programs
SIZES = (1, 2, 3, 7, 16, 31, 33, 64, 65, 100, 129, 197, 256, 300, 1030)
WIDTHS = (*SIZES, 384, 768, 1025, 4096, 5000)
LARGE = ((4097, 4100, 1025), (2048, 1536, 768), (8200, 2056, 128))
LONGEST = 700  # tokens of a sequence
HEADS = (1, 8, 16, 20, 64, 80, 128, 256)  # their sizes
DOTS = DTYPES  # of matrix products in a kernel
LAYOUTS = ("dense", "wide rows", "columns", "unaligned")
if not torch.cuda.is_available():  # the interpreter takes a second for each tile
    SIZES = (1, 2, 3, 7, 16, 17, 31, 33, 48, 65)  # type: ignore[assignment]
    WIDTHS = (*SIZES, 100, 129, 197, 256, 300)  # type: ignore[assignment]
    LARGE = ()  # type: ignore[assignment]
    DOTS = DTYPES[:2]  # type: ignore[assignment]  # it reads bfloat16 as whole numbers
    LONGEST, HEADS = 80, HEADS[:-1]  # type: ignore[assignment]
FEW = SIZES[:8] if torch.cuda.is_available() else (1, 2, 3, 5)  # rows of a quantizer


def multiplies_fp8() -> bool:
    """Whether the card at hand has instructions for e4m3; the interpreter has."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 9)


def sizes(rng: random.Random) -> tuple[int, int, int]:
    """M, N and K."""
    if LARGE and rng.random() < 0.1:
        return rng.choice(LARGE)
    return rng.choice(SIZES), rng.choice(SIZES), rng.choice(WIDTHS)


def laid_out(x: Tensor, rng: random.Random) -> Tensor:
    """The same values [M, K] in one of LAYOUTS."""
    layout = rng.choice(LAYOUTS)
    if layout == "wide rows":
        return torch.cat([x, x], -1)[:, : x.shape[1]]
    if layout == "columns":
        return x.T.contiguous().T
    if layout == "unaligned":  # a pointer that is a multiple of nothing
        flat = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
        flat[1:] = x.flatten()
        return flat[1:].view(x.shape)
    return x
