"""Speed of whole models on a CPU: float against quantized, in one process, interleaved.

    python -m pytest benchmarks -k cpu          or          python -m benchmarks.bench_cpu_models

Every contender runs once in turn, so that a noisy machine is noisy for all of them; medians are
reported, and speed as a ratio to the first contender in the same run. ONNX Runtime has a table of
its own without float32, which runs at half its speed beside it in one process. Outputs are checked
on the way: a model that is fast and wrong does not pass. Contenders that are not installed are
named as such. Writes benchmarks/results/cpu_models.json and cpu_models_ort.json.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers
from torch import Tensor, nn

import qtk

RESULTS = Path(__file__).parent / "results"
ROUNDS = 9
PAUSE = (
    0.05  # seconds before each: ONNX Runtime's threads spin on and halve their successor's speed
)
SIZES = ((16, 128), (1, 128), (1, 16))  # sentences, tokens each

Forward = Callable[[dict[str, Tensor]], Tensor]


def minilm() -> nn.Module:
    from benchmarks.data import minilm_path

    return transformers.AutoModel.from_pretrained(minilm_path()).eval()


def bert_base_width() -> nn.Module:
    """Four layers of BERT-base's width, random weights: for speed only."""
    torch.manual_seed(0)
    config = transformers.BertConfig(num_hidden_layers=4)
    return transformers.BertModel(config).eval()


MODELS = {"MiniLM, 6 layers": minilm, "BERT-base width, 4 layers": bert_base_width}


def batch(size: tuple[int, int]) -> dict[str, Tensor]:
    ids = torch.randint(1000, 20000, size, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def contenders(
    model: nn.Module, with_ort: bool = False
) -> tuple[dict[str, Forward], dict[str, str]]:
    """Everything that can run this model here, and why the others cannot."""
    calib = [batch((8, 64))]

    def ours(**options: Any) -> Forward:
        qmodel = qtk.quantize(model, calib=calib, progress=False, **options)
        return lambda inputs: qmodel(**inputs)[0]

    config: Any = model.config
    half = transformers.BertModel(config).eval()
    half.load_state_dict(model.state_dict())
    half = half.to(torch.bfloat16)
    running: dict[str, Forward] = {
        "float32": lambda inputs: model(**inputs)[0],
        "bfloat16": lambda inputs: half(**inputs)[0],
        "qtk W8A8": ours(w=8, a=8, preset="fast"),
        "qtk W8A8 token": ours(w=8, a=8, preset="fast", activations="token"),
        "qtk W4A8": ours(w=4, a=8, preset="fast"),
        "qtk W4A4 rotated": ours(w=4, a=4, rounding="nearest"),
    }
    peers = {"ONNX Runtime int8 dynamic": ort} if with_ort else {"torchao int8 dynamic": torchao}
    if with_ort:
        running = {name: running[name] for name in ("bfloat16", "qtk W8A8", "qtk W4A8")}
    missing: dict[str, str] = {}
    for name, build in peers.items():
        try:
            running[name] = build(model)
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
    return running, missing


def torchao(model: nn.Module) -> Forward:
    """torchao's dynamic int8, in eager mode."""
    import copy

    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    other = copy.deepcopy(model)
    quantize_(other, Int8DynamicActivationInt8WeightConfig())
    return lambda inputs: other(**inputs)[0]


def export_onnx(model: nn.Module, path: Path) -> None:
    """Writes an encoder that reads input_ids and attention_mask, batch and tokens of any size."""

    class Positional(nn.Module):
        """The exporter wants inputs by position and one tensor out."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            out: Tensor = self.inner(input_ids=input_ids, attention_mask=attention_mask)[0]
            return out

    inputs = batch((2, 16))
    axes = {0: "batch", 1: "tokens"}
    torch.onnx.export(
        Positional(), tuple(inputs.values()), str(path), dynamo=False,
        input_names=list(inputs), output_names=["hidden"],
        dynamic_axes={**dict.fromkeys(inputs, axes), "hidden": axes},
    )  # fmt: skip


def ort(model: nn.Module) -> Forward:
    """ONNX Runtime's dynamic int8."""
    import tempfile

    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    folder = Path(tempfile.mkdtemp())
    export_onnx(model, folder / "model.onnx")
    quantize_dynamic(folder / "model.onnx", folder / "int8.onnx", weight_type=QuantType.QInt8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # threads that spin on after a call halve the speed of whoever runs next
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(folder / "int8.onnx"), options)
    return lambda inputs: torch.from_numpy(
        session.run(["hidden"], {k: v.numpy() for k, v in inputs.items()})[0]
    )


@torch.inference_mode()
def measure(
    running: dict[str, Forward], inputs: dict[str, Tensor], want: Tensor
) -> dict[str, float]:
    """Median milliseconds of each, interleaved; checks every output against float32's."""
    for name, forward in running.items():
        got = forward(inputs).float()
        cosine = torch.nn.functional.cosine_similarity(want, got, dim=-1).mean()
        assert cosine > 0.6, f"{name} computes something else: cosine {cosine:.3f}"
    times: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(ROUNDS + 2):
        for name, forward in running.items():
            time.sleep(PAUSE)
            start = time.perf_counter()
            forward(inputs)
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(ts[2:]) for name, ts in times.items()}


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    flags = [n for n in ("vnni", "amx_tile") if getattr(torch.cpu, f"_is_{n}_supported", bool)()]
    return f"{name}, {torch.get_num_threads()} threads, {' '.join(flags) or 'no int8 instructions'}"


@torch.inference_mode()
def run(with_ort: bool = False) -> dict[str, Any]:
    rows, notes = [], ["eager mode throughout"]
    for title, build in MODELS.items():
        model = build()
        running, missing = contenders(model, with_ort)
        notes += [f"{name} could not run ({why})" for name, why in missing.items()]
        for size in SIZES:
            inputs = batch(size)
            medians = measure(running, inputs, model(**inputs)[0].float())
            base = next(iter(medians.values()))
            where = f"{title}, {size[0]}x{size[1]}"
            rows += [[where, n, f"{ms:.2f}", f"{base / ms:.2f}x"] for n, ms in medians.items()]
    first = "bfloat16" if with_ort else "float32"
    return {
        "title": "Whole models on a CPU" + (", beside ONNX Runtime" if with_ort else ""),
        "hardware": cpu_name(),
        "versions": {
            "qtk": qtk.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "columns": ["model, batch x tokens", "what", "ms", f"over {first}"],
        "rows": rows,
        "notes": "; ".join(["medians of interleaved runs", *dict.fromkeys(notes)]),
    }


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("what", ["float32", "qtk W8A8"])
def test_bench_cpu_minilm(benchmark: Any, what: str, size: tuple[int, int]) -> None:
    """The two sides that the README compares, under pytest-benchmark."""
    model = minilm()
    if what != "float32":
        model = qtk.quantize(model, 8, 8, calib=[batch((8, 64))], preset="fast", progress=False)
    inputs = batch(size)
    with torch.inference_mode():
        benchmark(lambda: model(**inputs))


def test_bench_cpu_table() -> None:
    """The whole tables, written to results."""
    for name, with_ort in (("cpu_models", False), ("cpu_models_ort", True)):
        text = json.dumps(run(with_ort), indent=1)
        (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    test_bench_cpu_table()
