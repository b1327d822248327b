"""Measures tiles of the matrix products on this GPU and writes `tuned/sm_<capability>.json`."""

import json
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch

from ._int4 import pack_int4
from ._lang import triton
from ._launch import TUNED, _table, gemm_launch, nearest, use_tile
from .fp8_linear import fp8_linear, to_fp8
from .int4_linear import int4_linear
from .int8_linear import int8_linear
from .weight_only_linear import weight_only_linear

MODELS = {  # hidden and MLP width
    "BERT-base": (768, 3072), "BERT-large": (1024, 4096), "ViT-B": (768, 3072),
    "ViT-L": (1024, 4096), "OPT-125m": (768, 3072), "OPT-350m": (1024, 4096),
    "OPT-1.3b": (2048, 8192), "OPT-2.7b": (2560, 10240), "OPT-6.7b": (4096, 16384),
    "OPT-13b": (5120, 20480),
}  # fmt: skip
ROWS = (1, 16, 64, 512, 4096)
KERNELS = (
    "int8_linear", "int4_linear W4A8", "int4_linear W4A4", "weight_only_linear W8A16",
    "weight_only_linear W4A16 grouped", "fp8_linear",
)  # fmt: skip
L2 = 1 << 28  # bytes of weights to go around in, so that no cache answers
REPEATS = 20


def widths() -> list[tuple[int, int]]:
    """(N, K) of the linears of the models: attention, both of the MLP."""
    pairs = {pair for h, m in MODELS.values() for pair in ((h, h), (m, h), (h, m))}
    return sorted(pairs, key=lambda pair: pair[0] * pair[1])


def linear_call(kernel: str, M: int, N: int, K: int, device: torch.device) -> Callable[[int], Any]:
    """call(i) runs the kernel with the i-th of enough weights to miss every cache."""
    op = kernel.removesuffix(" grouped")
    small = "W4" in op
    copies = min(max(L2 // (N * K // (2 if small else 1)), 1), 64) + 1
    codes = torch.randint(-8, 8, (N, K), dtype=torch.int8, device=device)
    stored = pack_int4(codes) if small else codes
    if op == "fp8_linear":
        stored = to_fp8(codes)[0]
    weights = [stored.clone() for _ in range(copies)]
    G = -(-K // 128) if kernel.endswith("grouped") else 1
    w_scale = torch.rand(N, G, device=device)
    x = torch.randn(M, K, device=device, dtype=torch.bfloat16)
    x_scale = torch.rand(M, 1, device=device)
    x_q = torch.randint(-8, 8, (M, K), dtype=torch.int8, device=device)
    bf16: dict[str, Any] = {"out_dtype": torch.bfloat16, "backend": "triton"}
    if op == "int8_linear":
        return lambda i: int8_linear(x_q, weights[i % copies], w_scale, x_scale=x_scale, **bf16)
    if op == "fp8_linear":
        x_8 = to_fp8(x)[0]
        return lambda i: fp8_linear(x_8, weights[i % copies], w_scale, x_scale=x_scale, **bf16)
    if op.startswith("weight_only"):
        args: dict[str, Any] = {
            "bits": 4 if small else 8,
            "in_features": K,
            "group_size": 128 if G > 1 else None,
        }
        return lambda i: weight_only_linear(
            x, weights[i % copies], w_scale, **args, backend="triton"
        )
    packed = op.endswith("W4A4")
    x_4 = pack_int4(x_q) if packed else x_q
    return lambda i: int4_linear(
        x_4, weights[i % copies], w_scale, x_scale=x_scale, in_features=K, x_packed=packed, **bf16
    )


def candidates(kernel: str, M: int) -> Iterator[dict[str, Any]]:
    """Tiles worth a measurement; a left operand unpacked in registers only on two warps."""
    unpacks = "W4" in kernel or "A16" in kernel
    names = ("BLOCK_M", "BLOCK_N", "GROUP_M", "SWAP", "num_warps", "num_stages", "SPLIT_K")
    if M <= 64:
        block_m = 16 if M <= 16 else 32 if M <= 32 else 64
        for block_n, stages, split in product((64, 128), (3, 5), (1, 2, 4, 8)):
            warps = 2 if unpacks else 4
            yield dict(zip(names, (block_m, block_n, 8, True, warps, stages, split), strict=True))
    if M > 16:
        for block_m, block_n, stages in product((64, 128), (64, 128, 256), (2, 3, 4)):
            warps = 8 if block_m * block_n >= 128 * 128 else 4
            if not (kernel.endswith("W4A4") and block_m >= 64):  # tokens, too, are unpacked
                yield dict(zip(names, (block_m, block_n, 8, False, warps, stages, 1), strict=True))


def microseconds(call: Callable[[int], Any]) -> float:
    """Median time on the device of one call."""
    for i in range(3):
        call(i)
    events = [(_event(), _event()) for _ in range(REPEATS)]
    for i, (start, stop) in enumerate(events):
        start.record()
        call(i)
        stop.record()
    torch.cuda.synchronize()
    times = sorted(start.elapsed_time(stop) for start, stop in events)
    return 1e3 * times[len(times) // 2]


def best_tile(kernel: str, M: int, N: int, K: int, device: torch.device) -> dict[str, Any]:
    """One entry of the table: the fastest tile, and the seconds that the first call took."""
    call = linear_call(kernel, M, N, K, device)
    start = time.perf_counter()
    call(0)
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    best: dict[str, Any] = {"us": microseconds(call)}
    best["tile"] = _present(kernel, M, N, K, device)
    for tile in candidates(kernel, M):
        with use_tile(tile):
            try:
                us = microseconds(call)
            except triton.OutOfResources:  # too much shared memory for this device
                continue
        if us < best["us"]:
            best = {"us": us, "tile": tile}
    us = round(best["us"], 2)
    return {"kernel": kernel, "M": M, "N": N, "K": K, "tile": best["tile"], "us": us,
            "first_call_s": round(first, 2)}  # fmt: skip


def tune(
    folder: Path | None = None, minutes: float = 8.0, log: Callable[[str], Any] = print
) -> Path:
    """Measures every kernel at the shapes of the models, and stops when the time is over.

    Args:
        folder: where the table goes; None for the package, where the kernels find it.

    Returns:
        The file; entries that it held for other shapes are kept.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    major, minor = torch.cuda.get_device_capability(device)
    path = (folder or TUNED) / f"sm_{major}{minor}.json"
    found = {_key(e): e for e in json.loads(path.read_text())["entries"]} if path.exists() else {}
    end = time.monotonic() + 60 * minutes
    for M, (N, K), kernel in product(ROWS, widths(), KERNELS):
        if time.monotonic() > end or (kernel, M, N, K) in found:
            continue
        entry = best_tile(kernel, M, N, K, device)
        found[_key(entry)] = entry
        log(f"{kernel} {M}x{N}x{K}: {entry['us']} us, first call {entry['first_call_s']} s")
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    table = {"device": torch.cuda.get_device_name(device), "capability": [major, minor],
             "versions": versions, "entries": list(found.values())}  # fmt: skip
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    _table.cache_clear()
    nearest.cache_clear()
    return path


def _present(kernel: str, M: int, N: int, K: int, device: torch.device) -> dict[str, Any]:
    """What runs without this measurement."""
    op = kernel.removesuffix(" grouped")
    return gemm_launch(
        op, M, N, K, device=device, grouped=op != kernel, weight_bits=4 if "W4" in op else 8,
        computed_weights="W4" in op or "A16" in op, computed_tokens="W4A4" in op, wide="A16" in op,
    )  # fmt: skip


def _key(entry: dict[str, Any]) -> tuple[str, int, int, int]:
    return entry["kernel"], entry["M"], entry["N"], entry["K"]


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)
