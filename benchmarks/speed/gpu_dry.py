"""A program of the GPU benches where there is no GPU: everything but the numbers.

    python -m benchmarks.speed.gpu_dry FOLDER MODULE [arguments of MODULE]

Launches are compiled for sm_90 by Triton's own JIT and not run; the clock says five microseconds
after one call; tensors are shapes without memory, but in whole models. Tests are collected, not
run; the sanitizer runs what it is given, and finds nothing. Results are written to FOLDER and mean
nothing.
"""

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
from tests.kernels import jit  # isort: skip (a card has to be imagined before kernels are imported)
import torch

from benchmarks import result
from qtk_kernels import _launch, dispatch, tune

ARCH = 90
NAME = "imagined GPU"
RUN = {"device": NAME, "driver": "0", "torch": torch.__version__, "triton": jit.triton.__version__}


def clock(calls: tune.Calls, rounds: int = 1, graph: bool = True) -> float:
    calls[-1]()
    return 5.0


def as_it_is(model: Any, **_: Any) -> Any:
    return model


def nothing(*_: Any) -> None: ...


def imagine(folder: Path, arch: int = ARCH) -> None:
    """A card, before the programs that ask for one are imported."""
    capability = divmod(arch, 10)
    result.RESULTS = _launch.TUNED = folder
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_capability = lambda device=None: capability  # type: ignore[assignment]
    torch.cuda.synchronize = torch.cuda.empty_cache = nothing  # type: ignore[assignment]
    torch.compile = as_it_is  # type: ignore[assignment]
    tune.microseconds = clock
    card = _launch.Card(NAME, capability, 132)
    tune._this_gpu = lambda: (torch.device("meta"), card)
    tune._close = lambda got, want: True
    from benchmarks.speed import gpu_device

    gpu_device.this_run = lambda: RUN
    gpu_device.RUN[:] = [sys.executable, "-m", "benchmarks.speed.gpu_dry", str(folder)]


def shapes_only(module: Any) -> None:
    """Nothing is computed: no memory, and no values to compare."""
    kernels: Any = importlib.import_module("benchmarks.speed.gpu_kernels")
    kernels.DEVICE = "meta"
    module.DEVICE = "meta"
    kernels.find_spec = lambda name: True  # packages: what we measure beside them is still ours
    if hasattr(module, "error_of"):
        module.error_of = lambda y, qkv, causal: 0.0
    if hasattr(module, "_tma"):  # planned as on a Hopper
        jit_cases: Any = importlib.import_module("tests.kernels.jit_cases")
        jit_cases.hopper().__enter__()
    if hasattr(module, "same"):
        module.same = lambda got, want: None
    if hasattr(module, "digest"):
        module.digest = lambda x: "none"


def small_models(module: Any) -> None:
    """Real values, because weights are rounded; a block or two, because all are alike."""
    import transformers

    def shallow(config: Callable[..., Any]) -> Callable[..., Any]:
        return lambda **options: config(**{**options, "num_hidden_layers": 1})

    for name in ("BertConfig", "ViTConfig", "OPTConfig"):
        setattr(transformers, name, shallow(getattr(transformers, name)))
    module.DEVICE = "cpu"
    torch.cuda.is_available = lambda: False
    importlib.import_module("benchmarks.speed.gpu_unpadded").Unpadded.varlen = (
        lambda self, q, k, v: v
    )
    module.has_gpu = lambda: True
    timed = module.time_of

    def compiled(*arguments: Any) -> float:
        with dispatch.use_backend("triton"):  # not while a model is quantized: that reads values
            return timed(*arguments)

    module.time_of = compiled


SANITIZER = """#!/bin/sh
shift 6  # its own arguments
"$@"
status=$?
echo "========= ERROR SUMMARY: 0 errors, imagined"
exit $status
"""


def with_sanitizer(module: Any) -> None:
    """A compute-sanitizer for who looks for one."""
    shapes_only(module)
    tool = result.RESULTS / "bin" / "compute-sanitizer"
    tool.parent.mkdir(exist_ok=True)
    tool.write_text(SANITIZER)
    tool.chmod(0o755)
    os.environ["PATH"] = f"{tool.parent}{os.pathsep}{os.environ['PATH']}"


def collected_only(module: Any) -> None:
    """What a test computes on a GPU needs one; that its file can be read does not."""
    sys.argv += ["--collect-only", "-q"]


class Compiled(Exception):
    """Ends a check where a GPU would compare."""


def checks_only(module: Any) -> None:
    """The random checks up to where kernels and references would be compared."""
    from tests.gpu import attention, cases, linears, quantizers

    cases.LARGE = ()  # type: ignore[assignment]  # the same launches, in gigabytes

    def both(op: Callable[..., Any], *args: Any, **options: Any) -> None:
        op(*args, **options, backend="triton")
        raise Compiled

    for part in (attention, linears, quantizers):
        part.both = both  # type: ignore[attr-defined]
    check = module.check

    def compiled(name: str, seed: int, device: str) -> None:
        try:
            check(name, seed, "cpu")
        except Compiled:
            return

    module.check = compiled


DRY: dict[str, Callable[[Any], None]] = {
    "tests.gpu.check": checks_only,
    "benchmarks.speed.gpu_models": small_models,
    "benchmarks.speed.gpu_checks": with_sanitizer,
    "pytest": collected_only,
}


def main() -> int:
    folder, name, *arguments = sys.argv[1:]
    imagine(Path(folder))
    module = importlib.import_module(name)
    sys.argv = [name, *arguments]
    DRY.get(name, shapes_only)(module)
    jit.triton.knobs.compilation.always_compile = False
    with jit.compiling(ARCH):
        return int(module.main())


if __name__ == "__main__":
    sys.exit(main())
