"""Everything that can run a model on a CPU here, each in a process of its own.

Runtimes disturb one another inside one process: with ONNX Runtime's threads around, float32 in
PyTorch takes twice its time. So `Worker` builds one contender in a fresh process and calls it on
demand; the others sleep meanwhile.
"""

import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

Inputs = dict[str, Tensor]
Forward = Callable[[Inputs], Tensor]
Size = tuple[int, int]  # sentences (or images), tokens each

THREADS = torch.get_num_threads()
TOKENS = 197  # of a ViT's image of 224 pixels in patches of 16


def minilm() -> nn.Module:
    from benchmarks.data import minilm_path

    return transformers.AutoModel.from_pretrained(minilm_path())


def bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(num_hidden_layers=4))


def opt() -> nn.Module:
    return transformers.OPTModel(transformers.OPTConfig(num_hidden_layers=4, use_cache=False))


def vit() -> nn.Module:
    return transformers.ViTModel(transformers.ViTConfig(num_hidden_layers=4))


MODELS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "minilm": ("MiniLM, 6 layers", minilm),
    "bert": ("BERT-base width, 4 layers, random weights", bert),
    "opt": ("OPT-125m width, 4 layers, random weights", opt),
    "vit": ("ViT-base width, 4 layers, random weights", vit),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][1]().eval()


def inputs_of(name: str, size: Size) -> Inputs:
    """Random inputs, the same in every process."""
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(size[0], 3, 224, 224, generator=generator)}
    ids = torch.randint(1000, 20000, size, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def real_batches(evaluation: bool) -> list[Inputs]:
    """128 sentences to calibrate MiniLM with, or 128 others to judge it by."""
    from benchmarks.data import minilm_path
    from qtk.demo.sentences import split

    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_path())
    texts = split(128, 128)[evaluation]
    pieces = [texts[i : i + 32] for i in range(0, len(texts), 32)]
    batches = [tokenizer(piece, padding=True, return_tensors="pt") for piece in pieces]
    return [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in batches]


def calibration(name: str) -> list[Inputs]:
    return real_batches(False) if name == "minilm" else [inputs_of(name, (8, 64))]


# --- contenders: (model, its name) -> forward


def float32(model: nn.Module, name: str) -> Forward:
    return lambda inputs: model(**inputs)[0]


def bfloat16(model: nn.Module, name: str) -> Forward:
    model = model.to(torch.bfloat16)
    if name == "vit":
        return lambda inputs: model(inputs["pixel_values"].to(torch.bfloat16))[0]
    return lambda inputs: model(**inputs)[0]


def ours(**options: Any) -> Callable[[nn.Module, str], Forward]:
    def contender(model: nn.Module, name: str) -> Forward:
        import qtk

        if name != "minilm":  # random weights have no accuracy to lose
            options["preset"] = "fast"
        qmodel = qtk.quantize(model, calib=calibration(name), progress=False, **options)
        return float32(qmodel, name)

    return contender


def torchao(model: nn.Module, name: str) -> Forward:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return float32(model, name)


def quanto(model: nn.Module, name: str) -> Forward:
    from optimum import quanto as oq

    oq.quantize(model, weights=oq.qint8, activations=oq.qint8)
    with oq.Calibration():
        for batch in calibration(name):
            model(**batch)
    oq.freeze(model)
    return float32(model, name)


def compiled(inner: Callable[[nn.Module, str], Forward]) -> Callable[[nn.Module, str], Forward]:
    return lambda model, name: torch.compile(inner(model, name), dynamic=False)


def export_onnx(model: nn.Module, name: str, path: Path) -> None:
    """Writes the model with batch and tokens of any size."""
    names = list(inputs_of(name, (2, 16)))

    class Positional(nn.Module):
        """The exporter wants inputs by position and one tensor out."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, *tensors: Tensor) -> Tensor:
            out: Tensor = self.inner(**dict(zip(names, tensors, strict=True)))[0]
            return out

    axes = {0: "batch", 1: "tokens"} if name != "vit" else {0: "batch"}
    torch.onnx.export(
        Positional(), tuple(inputs_of(name, (2, 16)).values()), str(path), dynamo=False,
        input_names=names, output_names=["hidden"],
        dynamic_axes={**dict.fromkeys(names, axes), "hidden": axes},
    )  # fmt: skip


def onnxruntime(kind: str) -> Callable[[nn.Module, str], Forward]:
    def contender(model: nn.Module, name: str) -> Forward:
        import onnxruntime as ort
        from onnxruntime.quantization import (
            CalibrationDataReader,
            QuantType,
            quantize_dynamic,
            quantize_static,
        )
        from onnxruntime.quantization.shape_inference import quant_pre_process

        folder = Path(tempfile.mkdtemp())
        path, int8 = folder / "model.onnx", folder / "int8.onnx"
        export_onnx(model, name, path)
        if kind != "float32":
            quant_pre_process(str(path), str(path), skip_symbolic_shape=True)
        if kind == "dynamic":
            quantize_dynamic(path, int8, weight_type=QuantType.QInt8, per_channel=True)
        if kind == "static":

            class Reader(CalibrationDataReader):
                def __init__(self) -> None:
                    batches = calibration(name)
                    self.batches = iter([{k: v.numpy() for k, v in b.items()} for b in batches])

                def get_next(self) -> Any:
                    return next(self.batches, None)

            quantize_static(
                path, int8, Reader(), per_channel=True, weight_type=QuantType.QInt8,
                activation_type=QuantType.QUInt8, op_types_to_quantize=["MatMul", "Gemm"],
            )  # fmt: skip
        options = ort.SessionOptions()
        options.intra_op_num_threads = THREADS
        session = ort.InferenceSession(str(path if kind == "float32" else int8), options)
        return lambda inputs: torch.from_numpy(
            session.run(["hidden"], {k: v.numpy() for k, v in inputs.items()})[0]
        )

    return contender


W8A8 = {"w": 8, "a": 8}
CONTENDERS: dict[str, Callable[[nn.Module, str], Forward]] = {
    "float32": float32,
    "bfloat16": bfloat16,
    "float32, compiled": compiled(float32),
    "bfloat16, compiled": compiled(bfloat16),
    "qtk W8A8": ours(**W8A8),
    "qtk W8A8, compiled": compiled(ours(**W8A8)),
    "qtk W8A8 token": ours(**W8A8, activations="token"),
    "qtk W4A8": ours(w=4, a=8),
    "qtk W4A4": ours(w=4, a=4),
    "torchao int8 dynamic": torchao,
    "torchao int8 dynamic, compiled": compiled(torchao),
    "ONNX Runtime float32": onnxruntime("float32"),
    "ONNX Runtime int8 dynamic": onnxruntime("dynamic"),
    "ONNX Runtime int8 static": onnxruntime("static"),
    "optimum-quanto int8": quanto,
}
BASIC = ("float32", "bfloat16", "qtk W8A8", "qtk W8A8 token", "qtk W4A8")
# of a second encoder, to stay within a quarter of an hour: compilers take most of it
MAIN = (*BASIC, "qtk W8A8, compiled", "bfloat16, compiled", "torchao int8 dynamic, compiled",
        "ONNX Runtime int8 dynamic", "ONNX Runtime int8 static")  # fmt: skip


class Worker:
    """One contender in a process of its own."""

    def __init__(self, model: str, contender: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=_serve, args=(there, model, contender), daemon=True)
        self.process.start()
        self.error: str | None = self.pipe.recv()  # None once it is built

    def ask(self, *what: Any) -> Any:
        self.pipe.send(what)
        answer = self.pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def stop(self) -> None:
        self.process.terminate()
        self.process.join()


@torch.inference_mode()
def _serve(pipe: Any, model: str, contender: str) -> None:
    torch.set_num_threads(1)  # two workers are built at a time
    try:
        with torch.inference_mode(False):
            forward = CONTENDERS[contender](build(model), model)
        torch.set_num_threads(THREADS)
        pipe.send(None)
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}".splitlines()[0][:120])
        return
    while True:
        what, *rest = pipe.recv()
        try:
            pipe.send(ANSWERS[what](forward, model, *rest))
        except Exception as error:
            pipe.send(RuntimeError(f"{contender}: {error}"))


def _output(forward: Forward, model: str, size: Size) -> Any:
    return forward(inputs_of(model, size)).float().numpy()


def _times(forward: Forward, model: str, size: Size, calls: int) -> list[float]:
    """Milliseconds of each call."""
    inputs, times = inputs_of(model, size), []
    for _ in range(calls):
        start = time.perf_counter()
        forward(inputs)
        times.append(1e3 * (time.perf_counter() - start))
    return times


def _embeddings(forward: Forward, model: str) -> Any:
    """Mean over the tokens of each of 128 real sentences."""
    found = []
    for batch in real_batches(True):
        mask = batch["attention_mask"][..., None]
        found.append((forward(batch).float() * mask).sum(1) / mask.sum(1))
    return torch.cat(found).numpy()


ANSWERS: dict[str, Callable[..., Any]] = {
    "output": _output, "times": _times, "embeddings": _embeddings,
}  # fmt: skip
