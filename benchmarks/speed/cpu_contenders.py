"""Everything that can run a model on a CPU here, each in a process of its own.

Runtimes disturb one another inside one process: with ONNX Runtime's threads around, float32 in
PyTorch takes twice its time. So `Worker` builds one contender in a fresh process and calls it on
demand; the others sleep meanwhile.
"""

import multiprocessing
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from qtk_kernels.dispatch import HAS_INT8

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


def tiny() -> nn.Module:
    return transformers.BertModel(
        transformers.BertConfig(
            num_hidden_layers=1, hidden_size=64, num_attention_heads=2, intermediate_size=128
        )
    )


MODELS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "minilm": ("MiniLM, 6 layers", minilm),
    "bert": ("BERT-base width, 4 layers, random weights", bert),
    "opt": ("OPT-125m width, 4 layers, random weights", opt),
    "vit": ("ViT-base width, 4 layers, random weights", vit),
}
TINY = {"tiny": ("a tiny BERT, to try the benchmark itself", tiny)}
SIZES: dict[str, tuple[Size, ...]] = {
    "minilm": ((16, 128), (1, 128), (1, 16)),
    "bert": ((16, 128), (1, 128), (1, 16)),
    "opt": ((16, 128), (1, 128), (1, 16)),
    "vit": ((16, TOKENS), (1, TOKENS)),
    "tiny": ((2, 16), (1, 16)),
}
BUCKETS = {"tiny": (16,)}  # tokens that sentences are padded to
EVERY_BUCKET = (16, 32, 64, 128)
BATCH = 16  # sentences of one bucket at a time


def buckets_of(name: str) -> tuple[int, ...]:
    return BUCKETS.get(name, EVERY_BUCKET)


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return {**MODELS, **TINY}[name][1]().eval()


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


def ahead(buckets: bool, **options: Any) -> Callable[[nn.Module, str], Forward]:
    """qtk.compile for the sizes that are asked for, or for single sentences and batches of each
    bucket, and one package for the rest."""

    def contender(model: nn.Module, name: str) -> Forward:
        import qtk

        if name != "minilm":
            options["preset"] = "fast"
        qmodel = qtk.quantize(model, calib=calibration(name), progress=False, **options)
        sizes: list[Any] = [rows if name == "vit" else (rows, t) for rows, t in SIZES[name]]
        if buckets:
            sizes = [(rows, t) for rows in (1, BATCH) for t in buckets_of(name)]
        torch.set_num_threads(THREADS)  # packages keep the number they are compiled with
        return float32(qtk.compile(qmodel, sizes, progress=False, tune=name != "tiny"), name)

    return contender


def on_our_file(runtime: str, **options: Any) -> Callable[[nn.Module, str], Forward]:
    """ONNX Runtime or OpenVINO on what qtk.export wrote."""

    def contender(model: nn.Module, name: str) -> Forward:
        import qtk

        if name != "minilm":
            options["preset"] = "fast"
        qmodel = qtk.quantize(model, calib=calibration(name), progress=False, **options)
        folder = Path(tempfile.mkdtemp()) / "served"
        if runtime == "onnx":
            qtk.export(qmodel, folder, "onnx")
            return onnx_session(folder / "onnx" / "model.onnx")
        qtk.export(qmodel, folder, "openvino")
        return openvino_model(str(folder / "openvino" / "openvino_model.xml"))

    return contender


def openvino(kind: str) -> Callable[[nn.Module, str], Forward]:
    """OpenVINO by its own tools: float32, or int8 by NNCF's recipe for transformers."""

    def contender(model: nn.Module, name: str) -> Forward:
        import openvino as ov

        path = Path(tempfile.mkdtemp()) / "model.onnx"
        export_onnx(model, name, path)
        converted = ov.convert_model(str(path))
        if kind == "int8":
            import nncf

            batches = [{k: v.numpy() for k, v in b.items()} for b in calibration(name)]
            converted = nncf.quantize(
                converted, nncf.Dataset(batches), model_type=nncf.ModelType.TRANSFORMER
            )
        return openvino_model(converted)

    return contender


def openvino_model(model: Any) -> Forward:
    """Of OpenVINO, one request at a time for each thread that calls."""
    import openvino as ov

    settings = {"INFERENCE_NUM_THREADS": THREADS, "PERFORMANCE_HINT": "LATENCY"}
    compiled_model = ov.Core().compile_model(model, "CPU", settings)
    known = {name for entry in compiled_model.inputs for name in entry.get_names()}
    own = threading.local()

    def forward(inputs: Inputs) -> Tensor:
        if not hasattr(own, "request"):
            own.request = compiled_model.create_infer_request()
        feed = {k: v.numpy() for k, v in completed(inputs, known).items()}
        return torch.from_numpy(own.request.infer(feed)[compiled_model.outputs[0]].copy())

    return forward


def completed(inputs: Inputs, known: Iterable[str]) -> Inputs:
    """With the token types that a file may ask for."""
    found = {name: value for name, value in inputs.items() if name in known}
    if "token_type_ids" in known:
        found["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    return found


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
        return onnx_session(path if kind == "float32" else int8, exact=False)

    return contender


def onnx_session(path: Path, exact: bool = not HAS_INT8) -> Forward:
    """Of ONNX Runtime.

    Args:
        exact: without saturation on CPUs that have no VNNI, where the file would compute something
            else; slower, and needless where there is VNNI.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = THREADS
    if exact:
        options.add_session_config_entry("session.x64quantprecision", "1")
    session = ort.InferenceSession(str(path), options)
    known = [entry.name for entry in session.get_inputs()]
    first = session.get_outputs()[0].name
    return lambda inputs: torch.from_numpy(
        session.run([first], {k: v.numpy() for k, v in completed(inputs, known).items()})[0]
    )


W8A8 = {"w": 8, "a": 8}
W7A8 = {"w": 7, "a": 8}  # what computes in integers on a CPU of AVX2 without VNNI
CONTENDERS: dict[str, Callable[[nn.Module, str], Forward]] = {
    "float32": float32,
    "bfloat16": bfloat16,
    "float32, compiled": compiled(float32),
    "bfloat16, compiled": compiled(bfloat16),
    "qtk W8A8": ours(**W8A8),
    "qtk W8A8, compiled": compiled(ours(**W8A8)),
    "qtk W8A8 per token": ours(**W8A8, activations="token"),
    "qtk W4A8": ours(w=4, a=8),
    "qtk W4A4": ours(w=4, a=4),
    "torchao int8 dynamic": torchao,
    "torchao int8 dynamic, compiled": compiled(torchao),
    "ONNX Runtime float32": onnxruntime("float32"),
    "ONNX Runtime int8 dynamic": onnxruntime("dynamic"),
    "ONNX Runtime int8 static, its default recipe": onnxruntime("static"),
    "qtk W8A8 file in ONNX Runtime": on_our_file("onnx", **W8A8),
    "OpenVINO float32": openvino("float32"),
    "OpenVINO int8, NNCF": openvino("int8"),
    "qtk W8A8 file in OpenVINO": on_our_file("openvino", **W8A8),
    "qtk W8A8, qtk.compile": ahead(False, **W8A8),
    "qtk W7A8": ours(**W7A8),
    "qtk W7A8, qtk.compile": ahead(False, **W7A8),
    "qtk W8A8, qtk.compile in buckets": ahead(True, **W8A8),
    "qtk W7A8, qtk.compile in buckets": ahead(True, **W7A8),
    "optimum-quanto int8": quanto,
}
SERVED = ("float32", "qtk W8A8", "qtk W8A8, qtk.compile in buckets", "ONNX Runtime int8 dynamic",
          "qtk W8A8 file in ONNX Runtime", "OpenVINO int8, NNCF",
          "qtk W8A8 file in OpenVINO")  # fmt: skip
IN_BUCKETS = ("qtk W8A8, qtk.compile in buckets", "qtk W7A8, qtk.compile in buckets")
SEVEN = ("qtk W7A8", "qtk W7A8, qtk.compile")  # differ from W8A8 only without VNNI
BASIC = ("float32", "bfloat16", "qtk W8A8", "qtk W8A8 per token", "qtk W4A8")
# of a second encoder, to stay within a quarter of an hour: compilers take most of it
MAIN = (*BASIC, "qtk W8A8, compiled", "bfloat16, compiled", "torchao int8 dynamic, compiled",
        "ONNX Runtime int8 dynamic", "qtk W8A8 file in ONNX Runtime", "OpenVINO int8, NNCF",
        "qtk W8A8 file in OpenVINO", "qtk W8A8, qtk.compile")  # fmt: skip


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


def _throughput(forward: Forward, model: str, sizes: list[Size]) -> float:
    """Seconds for all these batches, one after the other."""
    batches = [inputs_of(model, size) for size in sizes]
    start = time.perf_counter()
    for batch in batches:
        forward(batch)
    return time.perf_counter() - start


def _latencies(forward: Forward, model: str, lengths: list[int], clients: int) -> list[float]:
    """Milliseconds of each single request, from so many threads at a time."""
    requests = {n: inputs_of(model, (1, n)) for n in set(lengths)}

    def one(n: int) -> float:
        start = time.perf_counter()
        with torch.inference_mode():  # of a thread, not of the process
            forward(requests[n])
        return 1e3 * (time.perf_counter() - start)

    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(one, lengths))


ANSWERS: dict[str, Callable[..., Any]] = {
    "output": _output, "times": _times, "embeddings": _embeddings,
    "throughput": _throughput, "latencies": _latencies,
}  # fmt: skip
