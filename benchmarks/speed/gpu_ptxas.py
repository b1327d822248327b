"""Whether two assemblers make the same of kernels whose left operand waits in registers.

    python -m benchmarks.speed.gpu_ptxas [--seeds 50] [--other PTXAS]

wgmma with such operands meets a defect of ptxas before 13.3. Inputs are whole numbers, so that sums
are exact in any order, and every result must have the same bits under both. The other assembler is
the one named, or Triton's own for Blackwell, which is newer. A process each, with a cache each; the
kernels of one process are compiled by one assembler.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed.gpu_device import RUN, has_gpu
from qtk_kernels._lang import triton
from qtk_kernels.codes import Codes
from qtk_kernels.hadamard_quantize import hadamard_quantize
from qtk_kernels.quantized_attention import pack_heads, quantized_attention

DEVICE = "cuda"
BIN = Path(str(triton.__file__)).parent / "backends" / "nvidia" / "bin"


def whole(shape: tuple[int, ...], top: int = 7) -> Tensor:
    return torch.randint(-top, top + 1, shape, device=DEVICE)


def hadamard(K: int) -> Tensor:
    one, x = torch.ones(K, device=DEVICE), whole((256, K)).bfloat16()
    return hadamard_quantize(x, one, None, Codes(8, "token"), block=K, backend="triton")[0]


def attention(T: int, kind: str) -> Tensor:
    """Code softmax of whole scores, and v of whole numbers."""
    q, k, v = (whole((2, 4, T, 64)) for _ in range(3))
    options: dict[str, Any] = {}
    if kind == "bf16":
        q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    else:
        one = torch.ones(2, 4, 1, device=DEVICE)
        options = {"q_scale": one, "k_scale": one}
        q, k, v = q.to(torch.int8), k.to(torch.int8), v.transpose(2, 3).contiguous().transpose(2, 3)
        q, k = (pack_heads(q), pack_heads(k)) if kind == "int4" else (q, k)
        v = v.to(torch.float8_e4m3fn if kind == "fp8" else torch.int8)
        if kind != "fp8":
            options["v_scale"] = one.expand(2, 4, 64)
    return quantized_attention(
        q, k, v, **options, softmax="code", steps=4, scale=2.0**-4, backend="triton"
    )


CASES: dict[str, Callable[[], Tensor]] = {
    **{f"hadamard {K}": partial(hadamard, K) for K in (768, 2560)},
    **{
        f"attention {kind} T={T}": partial(attention, T, kind)
        for T in (197, 512) for kind in ("int8", "int4", "fp8", "bf16")
    },
}  # fmt: skip


def digest(x: Tensor) -> str:
    """Of its bytes."""
    raw = x.contiguous().view(torch.uint8).cpu().numpy().tobytes()
    return hashlib.sha256(raw).hexdigest()[:16]


def digests(seeds: int) -> Iterator[str]:
    """A line for each case: its name, and what its results were."""
    for name, case in CASES.items():
        found = []
        try:
            for seed in range(seeds):
                torch.manual_seed(seed)
                found.append(digest(case()))
        except Exception as error:
            found = [f"{type(error).__name__}: {error}".splitlines()[0]]
        yield f"{name}: {' '.join(found)}"


def by(ptxas: Path | None, seeds: int) -> dict[str, str]:
    """What a process with that assembler finds."""
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, "TRITON_CACHE_DIR": cache}
        if ptxas is not None:
            env["TRITON_PTXAS_PATH"] = str(ptxas)
        command = [*RUN, "benchmarks.speed.gpu_ptxas", "--digests", "--seeds", str(seeds)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr[-1000:], flush=True)
    lines = [line.partition(": ") for line in done.stdout.splitlines()]
    return {name: found for name, colon, found in lines if colon}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, help="of the whole step, which its seeds bound")
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--few", type=int, help="this many seeds")
    parser.add_argument("--other", type=Path, default=BIN / "ptxas-blackwell")
    parser.add_argument("--digests", action="store_true", help="of this process alone")
    options = parser.parse_args(arguments)
    if not has_gpu():
        print("No GPU: nothing is compared.")
        return 0
    seeds = options.few or options.seeds
    if options.digests:
        for line in digests(seeds):
            print(line, flush=True)
        return 0
    if not options.other.exists():
        print(f"ptxas: not compared, there is no {options.other.name}: give --other")
        return 0
    return compare(by(None, seeds), by(options.other, seeds), seeds)


def compare(ours: dict[str, str], others: dict[str, str], seeds: int) -> int:
    failed = 0
    for name in CASES:
        mine, theirs = ours.get(name, "nothing"), others.get(name, "nothing")
        pairs = list(zip(mine.split(), theirs.split(), strict=False))
        equal = mine == theirs and len(pairs) == seeds
        failed += not equal
        differ = sum(a != b for a, b in pairs)
        said = "equal" if equal else f"{differ} differ; {mine[:60]} / {theirs[:60]}"
        print(f"ptxas {name}: {seeds} seeds, {said}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
