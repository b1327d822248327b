"""ONNX: static W8A8 as QDQ, weights alone as MatMulNBits, everything else in float32.

    out/config.json, tokenizer...    what lies beside a model
    out/onnx/model.onnx              what sentence-transformers, optimum and fastembed look for

Run in ONNX Runtime, the same numbers as qtk's come out but for codes that stood between two values.
CPUs of x86 without VNNI add pairs of u8 x s8 products in 16 bits, which overflows: a session there
needs `session.x64quantprecision` at 1, which is what the check below runs with.
"""

from pathlib import Path
from typing import Any

import torch

from qtk import tracing
from qtk.errors import BackendError
from qtk.formats import Exported, Source, _layers, _trace
from qtk.formats._compare import (
    compared,
    needs_float_attention,
    needs_float_patches,
    saturates,
)

FILE = "onnx/model.onnx"
LARGEST = 2**31 - 2**24  # bytes of one protocol buffer; larger weights lie in a file beside it
SATURATES = (
    "this CPU has no VNNI, integer products of u8 x s8 overflow on it: sessions of ONNX Runtime "
    "need session.x64quantprecision=1, and OpenVINO has no such option; checked without overflow"
)
EXACT = {"session.x64quantprecision": "1"}  # no saturation where there is no VNNI


def write(source: Source, folder: Path) -> Exported:
    proto = graph(source)
    (folder / "onnx").mkdir()
    save(proto, folder / FILE)
    write_config(source.model, folder)
    session = _session(folder / FILE)
    names = [output.name for output in session.get_outputs()]

    def run(batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        known = {entry.name for entry in session.get_inputs()}
        feed = {name: value.numpy() for name, value in batch.items() if name in known}
        return dict(zip(names, session.run(names, feed), strict=True))

    import onnxruntime

    files = tuple(str(path.relative_to(folder)) for path in sorted((folder / "onnx").iterdir()))
    return compared(source, run, format="onnx", files=files, notes=notes(source),
                    checked_in=f"onnxruntime {onnxruntime.__version__}")  # fmt: skip


def graph(source: Source) -> Any:
    """The `onnx.ModelProto` of a quantized model.

    Raises:
        SchemeError, BackendError, ModelError: see `qtk.export`.
    """
    try:
        import onnx
        import onnxruntime  # noqa: F401, missed now rather than after a minute
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise BackendError(f"pip install 'qtk-torch[onnx]': {error}") from None
    _layers.check(source.linears)
    batch = tracing.example(source.model)
    outputs = tracing.output_names(source.model, batch)
    proto = _trace.traced(_trace.skeleton(source.model), batch, outputs)
    _layers.write(proto, source.linears, source.embeddings)
    if proto.ByteSize() < LARGEST:
        onnx.checker.check_model(proto)
    return proto


def notes(source: Source) -> tuple[str, ...]:
    """What the file has not as qtk has it, and what a runtime needs for it."""
    found = [*needs_float_attention(source.model), *needs_float_patches(source.model)]
    schemes = {spec.scheme for spec in source.linears.values()}
    if any(scheme.a is None for scheme in schemes):
        found.append("MatMulNBits is an operator of ONNX Runtime's own, which OpenVINO reads too")
    if saturates() and any(scheme.a is not None for scheme in schemes):
        found.append(SATURATES)
    return tuple(found)


def write_config(model: Any, folder: Path) -> None:
    """config.json of the float model: nobody who serves the file looks for qtk's weights."""
    config = type(model.config).from_dict(
        {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    )
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)


def save(proto: Any, path: Path) -> None:
    import onnx

    if proto.ByteSize() < LARGEST:
        onnx.save_model(proto, path)
    else:
        onnx.save_model(
            proto, path, save_as_external_data=True, location=f"{path.name}_data"
        )  # fmt: skip


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    for key, value in EXACT.items():
        options.add_session_config_entry(key, value)
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise BackendError(f"ONNX Runtime cannot run what was written: {error}") from error
