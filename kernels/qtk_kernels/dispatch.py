"""Which implementation of an op runs. Decided here and nowhere else.

triton     the hand-written kernel: CUDA tensors, or CPU tensors under TRITON_INTERPRET=1
cpu        the fastest PyTorch or oneDNN path on a CPU
reference  the definition of the op: exact, slow, on any device, and what the tests compare with
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

import torch
from torch import Tensor

from ._lang import triton

BACKENDS = ("triton", "cpu", "reference")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_CPU = torch.cpu.get_capabilities()


def int8_units(capabilities: Mapping[str, object], capped: str) -> bool:
    """Whether oneDNN has an instruction for sums of four u8 x s8 products.

    Args:
        capabilities: as `torch.cpu.get_capabilities()`.
        capped: the set of instructions oneDNN keeps to, by ONEDNN_MAX_CPU_ISA; "" for all.
    """
    cap = capped.upper()
    if cap in ("SSE41", "AVX", "AVX2", "AVX512_CORE"):
        return False
    names = ("avx_vnni",) if "AVX2" in cap else ("avx512_vnni", "avx_vnni", "amx_int8")
    return any(capabilities.get(name) for name in names)


def _capped() -> str:
    """oneDNN's cap, which has an older name too."""
    return os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""


HAS_INT8 = int8_units(_CPU, _capped())
EXACT_BITS = 15 if _CPU.get("avx2") else 0  # of both operands, where there is no such instruction

# a plain global, not a ContextVar: torch.compile can trace a read of it
_forced: str | None = os.environ.get("QTK_BACKEND")


def backend_of(x: Tensor, backend: str | None = None) -> str:
    """The backend for an op on `x`.

    An explicit `backend` wins, then what `use_backend` or QTK_BACKEND forces, then the device
    decides. None and "auto" leave the choice open.

    Raises:
        ValueError: a backend that is unknown or cannot run on `x`, or an `x` without axes.
    """
    if not x.ndim:
        raise ValueError("x must be [..., K], got a tensor without axes")
    name = _forced if backend is None or backend == "auto" else backend
    if name is None or name == "auto":
        name = "triton" if x.is_cuda else "cpu"
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}, expected one of {BACKENDS}")
    if name == "cpu" and x.is_cuda:
        raise ValueError(f"backend 'cpu' needs a CPU tensor, got one on {x.device}")
    if name == "triton" and x.is_cuda and torch.version.hip is not None:
        raise ValueError(
            "backend 'triton' needs an NVIDIA card, got one on ROCm: backend='reference' runs there"
        )
    if name == "triton" and triton is None:
        raise ValueError("backend 'triton' needs the package triton, which cannot be imported here")
    if name == "triton" and not x.is_cuda and not INTERPRETED:
        raise ValueError(
            f"backend 'triton' needs a CUDA tensor, got one on {x.device}; "
            "set TRITON_INTERPRET=1 before the first import to run it on a CPU"
        )
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces one backend inside a `with` block; "auto" lets the device decide."""
    global _forced
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}, expected 'auto' or one of {BACKENDS}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


_HERE = nullcontext()


def on_device(x: Tensor, *operands: Tensor | None) -> AbstractContextManager:
    """Makes the device of `x` current, for a launch on a second GPU; costs nothing on the first.

    Args:
        operands: what else the kernel reads.

    Raises:
        ValueError: a card from before sm_80, for which the kernels do not compile, an operand that
            lies elsewhere, or float64.
    """
    index = x.get_device()  # -1 on a CPU
    for operand in (x, *operands):
        if operand is None:
            continue
        if operand.get_device() != index:
            raise ValueError(
                f"x is on {x.device} and an operand of {list(operand.shape)} is on "
                f"{operand.device}: move it with .to(x.device)"
            )
        if operand.dtype == torch.float64:
            raise ValueError(
                f"backend 'triton' computes in float32, got float64 {list(operand.shape)}: "
                "convert it, or use backend='reference'"
            )
    if index < 0:
        return _HERE
    _check_card(index)
    return _HERE if index == torch.cuda.current_device() else torch.cuda.device(index)


@cache
def _check_card(index: int) -> None:
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        raise ValueError(
            f"backend 'triton' needs compute capability 8.0 or higher, got {major}.{minor} "
            f"({torch.cuda.get_device_name(index)}): backend='reference' runs there"
        )


def has_triton() -> bool:
    """Whether Triton can be imported here."""
    return triton is not None


def cpu_has_int8(w_bits: int = 8, a_bits: int = 8) -> bool:
    """Whether oneDNN's integer products of such codes are exact on this CPU.

    With VNNI or AMX they always are. AVX2 alone adds two products in 16 bits, which saturate unless
    2 * (2**a_bits - 1) * 2**(w_bits - 1) < 2**15: one of the operands has 7 bits or fewer.
    QTK_CPU_INT8=0 says no. 1 says yes, to try that path on another CPU: its sums saturate there.
    """
    said = os.environ.get("QTK_CPU_INT8")
    if said is not None:
        return said != "0"
    return HAS_INT8 or w_bits + a_bits <= EXACT_BITS
