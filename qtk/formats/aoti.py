"""One package of AOTInductor: native code with the weights in it, for any rows and tokens.

    out/model.pt2      what C++ and Python load: examples/serve.cpp
    out/config.json    of the float model

It runs on CPUs of the kind that it was made on, with the PyTorch that made it, which it needs as a
library. `qtk.compile` makes packages for sizes that are known beforehand, which are faster.
"""

from pathlib import Path
from typing import Any

import torch

from qtk.compiler import check
from qtk.compiler.program import compile_package, programs
from qtk.formats import Exported, Source, onnx
from qtk.formats._compare import compared
from qtk.packages.package import Package, Signature

FILE = "model.pt2"


def write(source: Source, folder: Path) -> Exported:
    check(source.model)
    program = programs(source.model, with_cache=False)[0]
    compile_package(program.export(source.model, None), folder / FILE, tune=True)
    package = Package(folder / FILE, None)
    inputs, outputs = program.signature.inputs, program.signature.outputs

    def run(batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        found = package([batch[name].contiguous() for name in inputs])
        return {name: y.numpy() for name, y in zip(outputs, found, strict=True)}

    onnx.write_config(source.model, folder)
    return compared(source, run, format="aoti", files=(FILE,), notes=_notes(program.signature),
                    checked_in=f"torch {torch.__version__}")  # fmt: skip


def _notes(signature: Signature) -> tuple[str, ...]:
    told = (
        f"{name} {signature.dtypes[name]} [{', '.join(axis or '...' for axis in axes)}]"
        for name, axes in signature.inputs.items()
    )
    level = torch.backends.cpu.get_cpu_capability()
    return (
        f"inputs, in order: {'; '.join(told)}",
        f"outputs: {', '.join(signature.outputs)}",
        f"native code for this kind of CPU ({level}) and torch {torch.__version__}",
    )
