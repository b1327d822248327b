"""Tile sizes, warps and stages, from rules instead of a search.

Nothing here was tuned on a GPU: the rules keep registers and shared memory within every device
from sm_80 on, which `benchmarks/aot_report.py` checks by compiling.
"""

MAX_ROW = 8192  # channels that one program holds in registers; longer rows are walked
SMS = 128  # programs that fill a large GPU


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


def dot_width(group_size: int) -> int:
    """Channels of one int8 dot product: the widest that groups are a multiple of."""
    for width in (128, 64, 32):
        if group_size % width == 0:
            return width
    raise ValueError(
        f"backend 'triton' needs groups of a multiple of 32 channels, got {group_size}"
    )


def gemm_launch(
    M: int,
    N: int,
    *,
    grouped: bool,
    computed_weights: bool,
    computed_tokens: bool = False,
    wide: bool = False,
) -> dict:
    """Tiles of a matrix product of M tokens and N output channels.

    With up to 32 tokens the weights take the side of 64 or more that Hopper's tensor cores want.

    Args:
        grouped: there are two accumulators, one for a group and one for all of them.
        computed_weights: the kernel computes the weight operand (unpacks it) in registers. Two
            warps then keep it on mma.sync when it is the left operand: left operands that are
            computed in registers meet a defect of ptxas before 13.3 on wgmma.
        computed_tokens: the same for the activations.
        wide: the activations are floats, which take more shared memory: fewer stages.
    """
    if M <= 32:
        BLOCK_M = 16 if M <= 16 else 32
        warps = 2 if computed_weights else 4
        return _tiles(BLOCK_M, 64, True, warps, 4)
    if computed_tokens:
        return _tiles(32, 128, False, 4, 3)  # below 64 rows there is no wgmma
    if cdiv(M, 128) * cdiv(N, 128) < SMS:
        return _tiles(64, 64, False, 4, 3)
    return _tiles(128, 64 if grouped else 128, False, 8, 2 if wide else 3)


def _tiles(block_m: int, block_n: int, swap: bool, warps: int, stages: int) -> dict:
    return {
        "BLOCK_M": block_m, "BLOCK_N": block_n, "GROUP_M": 8, "SWAP": swap,
        "num_warps": warps, "num_stages": stages,
    }  # fmt: skip
