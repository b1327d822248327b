"""Measures tiles of the matrix products on this GPU and writes `tuned/<card>.json`."""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._gemv import serves
from ._lang import triton
from ._launch import Card, card_of, gemm_launch, read_table, table_path, use_tile
from ._plan import forget
from .fp8_linear import fp8_linear, to_fp8
from .int4_linear import int4_linear
from .int8_linear import int8_linear
from .packing import pack_int4
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
L2 = 1 << 28  # bytes that calls go around in, so that no cache answers
MOST = 300  # calls in a round
ROUNDS = 11
LEAST = 30.0  # milliseconds of a measurement: event timers tick in half microseconds
Calls = list[Callable[[], Any]]
Shape = tuple[str, int, int, int]  # a kernel, M, N and K


def widths() -> list[tuple[int, int]]:
    """(N, K) of the linears of the models. A third of them first."""
    pairs = {pair for sizes in MODELS.values() for pair in pairs_of(*sizes)}
    by_size = sorted(pairs, key=lambda pair: (pair[0] * pair[1], pair))
    return [pair for start in range(3) for pair in by_size[start::3]]


def pairs_of(hidden: int, mlp: int) -> tuple[tuple[int, int], ...]:
    """N and K of a block: attention, and both linears of the MLP."""
    return (hidden, hidden), (mlp, hidden), (hidden, mlp)


def rounds_of(bytes_: float) -> int:
    """Calls until all have read more than a cache holds."""
    return min(max(int(L2 // bytes_), 1) + 1, MOST)


def copies(x: Tensor, n: int) -> list[Tensor]:
    """n tensors of the same values in memory of their own."""
    return list(x.expand(n, *x.shape).contiguous().unbind(0))


def random_codes(rows: int, K: int, top: int, device: Any) -> Tensor:
    """int8 in [-top, top)."""
    return torch.randint(-top, top, (rows, K), dtype=torch.int8, device=device)


def linear_calls(kernel: str, M: int, N: int, K: int, device: torch.device) -> Calls:
    """A round of calls of a kernel, each with weights and activations of its own."""
    op = kernel.removesuffix(" grouped")
    small, packed = "W4" in op, op.endswith("W4A4")
    # whole ranges: a device that multiplies small numbers draws less power and runs faster
    weight = random_codes(N, K, 8 if small else 127, device)
    weight = pack_int4(weight) if small else weight
    x: Tensor = torch.randn(M, K, device=device, dtype=torch.bfloat16)
    x_scale, G = torch.rand(M, 1, device=device), 1
    if op == "fp8_linear":
        weight, x = to_fp8(torch.randn(N, K, device=device))[0], to_fp8(x)[0]
    elif op.startswith("int"):
        x = random_codes(M, K, 8 if packed else 127, device)
        x = pack_int4(x) if packed else x
    if kernel.endswith("grouped"):
        G = -(-K // 128)
    w_scale = torch.rand(N, G, device=device)
    options: dict[str, Any] = {"backend": "triton", "x_scale": x_scale, "out_dtype": torch.bfloat16}
    run: Callable[..., Any] = int8_linear
    if op == "fp8_linear":
        run = fp8_linear
    elif op.startswith("int4"):
        run, options = int4_linear, {**options, "in_features": K, "x_packed": packed}
    elif op.startswith("weight_only"):
        run = weight_only_linear
        options = {"backend": "triton", "bits": 4 if small else 8, "in_features": K,
                   "group_size": 128 if G > 1 else None}  # fmt: skip
    n = rounds_of(weight.nbytes + x.nbytes)

    def call(x: Tensor, w: Tensor) -> Callable[[], Any]:
        return lambda: run(x, w, w_scale, **options)

    return [call(*pair) for pair in zip(copies(x, n), copies(weight, n), strict=True)]


def candidates(kernel: str, M: int) -> Iterator[dict[str, Any]]:
    """Tiles worth a measurement; a left operand unpacked in registers only on two warps."""
    unpacks, tokens_too = "W4" in kernel or "A16" in kernel, "W4A4" in kernel
    names = ("BLOCK_M", "BLOCK_N", "GROUP_M", "SWAP", "num_warps", "num_stages", "SPLIT_K")
    if M <= 64:
        block_m = 16 if M <= 16 else 32 if M <= 32 else 64
        for block_n, stages, split in product((64, 128), (3, 5), (1, 2, 4, 8)):
            warps = 2 if unpacks else 4
            yield dict(zip(names, (block_m, block_n, 8, True, warps, stages, split), strict=True))
    if M > 16:
        # unpacked tokens are a left operand, which below 64 rows does not go to wgmma
        for block_m, block_n in product((32,) if tokens_too else (64, 128), (64, 128, 256)):
            warps = 8 if block_m * block_n >= 128 * 128 else 4
            for stages in (2, 3, 4):
                yield dict(zip(names, (block_m, block_n, 8, False, warps, stages, 1), strict=True))


def microseconds(calls: Calls, rounds: int = ROUNDS, graph: bool = True) -> float:
    """Median time on the device of one of `calls`, over rounds that take LEAST in all.

    Args:
        graph: calls are replayed as a CUDA graph of all of them, which keeps the host out: it could
            not launch as fast as small kernels run. False launches them from the host.
    """
    for call in (calls * 3)[:3]:
        call()
    torch.cuda.synchronize()
    replay = _graph(calls).replay if graph else lambda: [call() for call in calls]
    replay()
    once = _elapsed(replay, 1)
    often = repeats(once, rounds)
    times = sorted(_elapsed(replay, often) for _ in range(rounds))
    return 1e3 * times[len(times) // 2] / (often * len(calls))


def repeats(once: float, rounds: int) -> int:
    """How often a round of `once` milliseconds is replayed, so that all take LEAST."""
    return max(ceil(LEAST / (rounds * max(once, 1e-3))), 1)


def _graph(calls: Calls) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def _elapsed(replay: Callable[[], Any], often: int) -> float:
    """Milliseconds on the device."""
    start, stop = _event(), _event()
    start.record()
    for _ in range(often):
        replay()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def best_tile(kernel: str, M: int, N: int, K: int, device: torch.device) -> dict[str, Any]:
    """One entry of the table: the fastest tile, and the seconds that the first call took.

    The tile is None where the product of few tokens, which has none, is faster than any.
    """
    calls = linear_calls(kernel, M, N, K, device)
    start = time.perf_counter()
    want = calls[0]()
    _synchronize(device)
    first = time.perf_counter() - start
    before_us = us = microseconds(calls)
    best = None if serves(kernel, M, N, K) else _present(kernel, M, N, K, device)
    for tile in candidates(kernel, M):
        with use_tile(tile):
            try:
                agrees = _close(calls[0](), want)
                found = microseconds(calls) if agrees else float("inf")
            except Exception as error:
                if not _refused(error):
                    raise
                continue
        if found < us:
            us, best = found, tile
    return {"kernel": kernel, "M": M, "N": N, "K": K, "tile": best, "us": round(us, 2),
            "before_us": round(before_us, 2), "first_call_s": round(first, 2)}  # fmt: skip


def _refused(error: Exception) -> bool:
    """Whether a tile is too large for this device or more than its compiler takes."""
    return isinstance(error, triton.errors.TritonError) or "PassManager" in str(error)


def _close(got: Tensor, want: Tensor) -> bool:
    """Whether a tile computes what the others do: float sums in another order, bfloat16 results."""
    error = (got.float() - want.float()).abs().max()
    return bool(error <= 2**-6 * want.float().abs().max())


def tune(
    folder: Path | None = None, minutes: float = 8.0, log: Callable[[str], Any] = print,
    shapes: Iterable[Shape] | None = None,
) -> Path:  # fmt: skip
    """Measures kernels at the shapes of the models, and stops when the time is over.

    Every entry is written once it is known. Another run goes on where this one stopped, unless
    torch or Triton have changed. A shape that fails is kept with what it said, under "failed", and
    is tried again by the next run, unless it took the device or the process with it.

    Args:
        folder: where the table goes; None for the package, where the kernels find it.
        shapes: what to measure; None for all of the models.

    Raises:
        DeviceLostError: after a failure the device answers no more; a new process may go on.
    """
    device, card = _this_gpu()
    path = table_path(card, folder)
    table = _earlier(path, card)
    known = {_key(e) for e in (*table["entries"], *(f for f in table["failed"] if f["fatal"]))}
    end = time.monotonic() + 60 * minutes
    for shape in all_shapes() if shapes is None else shapes:
        if shape in known or (shape[0] == "fp8_linear" and card.capability < (8, 9)):
            continue
        if time.monotonic() > end:
            log("out of time: another run goes on from here")
            break
        _measure(shape, table, path, device, log)
    write_table(path, table)
    forget()
    return path


def all_shapes() -> Iterator[Shape]:
    """Every kernel at the shapes of the models."""
    for (N, K), M, kernel in product(widths(), ROWS, KERNELS):
        yield kernel, M, N, K


class DeviceLostError(RuntimeError):
    """The device answers nothing more in this process."""


def answers(device: torch.device) -> bool:
    """Whether the device still does anything: after some errors it refuses all."""
    try:
        _synchronize(device)
    except Exception:  # whatever it says
        return False
    return True


def said(error: BaseException) -> str:
    """An error as a cell of a table."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


def _earlier(path: Path, card: Card) -> dict[str, Any]:
    """The table that another run left, or an empty one."""
    table: dict[str, Any] = {
        "device": card.name, "capability": list(card.capability), "processors": card.processors,
        "versions": {"torch": torch.__version__, "triton": triton.__version__}, "entries": [],
        "failed": [],
    }  # fmt: skip
    if path.exists():
        old = read_table(path)
        if all(old.get(name) == table[name] for name in ("device", "versions")):
            table |= {"entries": old["entries"], "failed": old.get("failed", [])}
    return table


def _measure(
    shape: Shape, table: dict[str, Any], path: Path, device: torch.device, log: Callable[[str], Any]
) -> None:
    """Adds an entry to the table, or what went wrong."""
    name = "{} {}x{}x{}".format(*shape)
    failed = [entry for entry in table["failed"] if _key(entry) != shape]
    started = {**dict(zip(KEY, shape, strict=True)), "error": "ended the process", "fatal": True}
    write_table(path, {**table, "failed": [*failed, started]})
    try:
        entry = best_tile(*shape, device)
    except Exception as error:
        fatal = not answers(device)
        table["failed"] = [*failed, {**started, "error": said(error), "fatal": fatal}]
        write_table(path, table)
        log(f"{name}: {said(error)}")
        if fatal:
            raise DeviceLostError(f"{name}: {said(error)}") from error
        return
    table["failed"] = failed
    table["entries"].append(entry)
    write_table(path, table)
    log(f"{name}: {entry['us']} us, before {entry['before_us']} us, "
        f"first call {entry['first_call_s']} s")  # fmt: skip


def write_table(path: Path, table: dict[str, Any]) -> None:
    """All of it or nothing: a reader never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(f".{os.getpid()}.tmp")
    whole.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    whole.replace(path)


def _present(kernel: str, M: int, N: int, K: int, device: torch.device) -> dict[str, Any]:
    """What runs without this measurement."""
    op = kernel.removesuffix(" grouped")
    return gemm_launch(
        op, M, N, K, device=device, grouped=op != kernel, weight_bits=4 if "W4" in op else 8,
        computed_weights="W4" in op or "A16" in op, computed_tokens="W4A4" in op, wide="A16" in op,
    )  # fmt: skip


KEY = ("kernel", "M", "N", "K")


def _key(entry: dict[str, Any]) -> Shape:
    return entry["kernel"], entry["M"], entry["N"], entry["K"]


def _this_gpu() -> tuple[torch.device, Card]:
    device = torch.device("cuda", torch.cuda.current_device())
    return device, card_of(device)


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
