"""OpenVINO's own files, through its converter of the ONNX form.

out/openvino/openvino_model.xml, .bin    what sentence-transformers and optimum-intel look for
"""

import tempfile
from pathlib import Path
from typing import Any

import torch

from qtk.errors import BackendError
from qtk.formats import Exported, Source, onnx
from qtk.formats._compare import compared, saturates

FOLDER = "openvino"
FILES = (f"{FOLDER}/openvino_model.bin", f"{FOLDER}/openvino_model.xml")
FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}  # of what is float; some CPUs would take bfloat16
EXACT = {"LP_TRANSFORMS_MODE": "NO"}  # codes are multiplied as floats


def write(source: Source, folder: Path) -> Exported:
    try:
        import openvino
    except ImportError as error:
        raise BackendError(f"pip install 'qtk-torch[openvino]': {error}") from None
    proto = onnx.graph(source)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        path = Path(work) / "model.onnx"
        onnx.save(proto, path)
        try:
            converted = openvino.convert_model(str(path))
        except Exception as error:
            raise BackendError(f"OpenVINO cannot convert what was written: {error}") from error
        (folder / FOLDER).mkdir()
        openvino.save_model(converted, folder / FILES[1], compress_to_fp16=False)
    onnx.write_config(source.model, folder)
    options = FLOAT32 | (EXACT if saturates() else {})
    compiled = openvino.Core().compile_model(str(folder / FILES[1]), "CPU", options)
    outputs = [output.get_any_name() for output in compiled.outputs]
    known = {name for entry in compiled.inputs for name in entry.get_names()}

    def run(batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        feed = {name: value.numpy() for name, value in batch.items() if name in known}
        return dict(zip(outputs, compiled(feed).values(), strict=True))

    version = openvino.get_version().split("-")[0]
    return compared(source, run, format="openvino", files=FILES, notes=onnx.notes(source),
                    checked_in=f"openvino {version}")  # fmt: skip
