"""Triton's own JIT without a GPU: a launch compiles its kernel for a card and runs nothing.

Neither the interpreter nor a build ahead of time does what a launch does: the JIT makes a constant
of every whole number that is 1, and learns from every pointer and size whether 16 divides it.

To be imported before `qtk_kernels`, in a process of its own without TRITON_INTERPRET.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

from qtk_kernels import dispatch, quantized_attention, weight_only_linear

# bytes of shared memory that a program may use
SHARED = {80: 166912, 86: 101376, 90: 232448, 100: 232448}


@dataclass(frozen=True)
class Binary:
    """What came of one launch.

    Attributes:
        kernel: its name.
        arch: 90 for sm_90.
        shared: bytes of shared memory.
        stack: bytes of a thread's stack, where registers spill.
        serialized: ptxas waits after each wgmma.
        head: channels of a head as attention holds them, else 0.
    """

    kernel: str
    arch: int
    shared: int
    stack: int
    serialized: bool
    head: int = 0


class Imagined(DriverBase):
    """A card that is not there. Its device number is its architecture: caches stay apart."""

    def __init__(self) -> None:
        self.arch = 90

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_active_torch_device(self) -> Any:
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


_card = Imagined()
triton.runtime.driver.set_active(_card)
triton.knobs.compilation.always_compile = True
triton.knobs.nvidia.dump_ptxas_log = True
dispatch.INTERPRETED = True  # lets CPU tensors through; ops took their own copy, and are compiled
assert not (quantized_attention.INTERPRETED or weight_only_linear.INTERPRETED)
_launch = JITFunction.run


@contextmanager
def compiling(arch: int, ones: str = "none") -> Iterator[list[Binary]]:
    """Every launch inside the block is compiled for sm_`arch`; gives what came of them.

    Args:
        ones: whole numbers of a launch that must compile as 1, too: "none", "each" by itself, or
            "all" at once. Nothing runs, so that sizes may be what they like.
    """
    found: list[Binary] = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        sizes = [i for i, a in enumerate(args) if isinstance(a, int) and not isinstance(a, bool)]
        with redirect_stdout(io.StringIO()) as log:
            compiled = _launch(kernel, *args, grid=grid, warmup=True, **options)
            found.append(_read(compiled, arch, log.getvalue(), options.get("BLOCK_D", 0)))
            for replaced in [[i] for i in sizes] if ones == "each" else [sizes] * (ones == "all"):
                changed = [1 if i in replaced else a for i, a in enumerate(args)]
                _launch(kernel, *changed, grid=grid, warmup=True, **options)

    before, _card.arch, JITFunction.run = _card.arch, arch, run
    try:
        yield found
    finally:
        _card.arch, JITFunction.run = before, _launch


def _read(compiled: Any, arch: int, log: str, head: int) -> Binary:
    """Of a launch whose like was compiled before there is no log, and nothing new to say."""
    stack = [int(n) for n in re.findall(r"(\d+) bytes stack frame", log)]
    return Binary(
        compiled.name, arch, compiled.metadata.shared, max(stack, default=0), "serializ" in log,
        head,
    )  # fmt: skip
