"""qtk beside its peers: the same weights, sentences and metric, each by its documented recipes.

    python -m benchmarks.accuracy.peers [--resume | --packages NAME ...]

MiniLM on STS-B test, the linears of the six layers, calibration draw 0 where a recipe calibrates.
Peers pin different versions of transformers: run this once in the environment of each, with
--resume, and the rows come together in benchmarks/results/fidelity_peers.json. A peer that is not
installed has a row that says so until it is. --packages measures those again and keeps the rest.
"""

import argparse
import copy
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qtk
from benchmarks import data
from benchmarks.accuracy.table import quantize
from benchmarks.result import Row, read, result, write

Peer = Callable[[nn.Module, Any, list[str]], nn.Module]  # model, tokenizer, sentences -> quantized
LAYERS = re.compile(r"encoder\.layer\.\d+\..*")
BATCH = 32


def in_layers(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and LAYERS.fullmatch(name) is not None


def batches(tokenizer: Any, texts: list[str]) -> Iterator[dict[str, Tensor]]:
    for i in range(0, len(texts), BATCH):
        yield dict(tokenizer(texts[i : i + BATCH], padding=True, return_tensors="pt"))


def ours(**options: Any) -> Peer:
    return lambda model, tokenizer, texts: quantize(model, texts, options, 0, tokenizer=tokenizer)


def torchao(kind: str, hqq: bool = False) -> Peer:
    def apply(model: nn.Module, tokenizer: Any, texts: list[str]) -> nn.Module:
        from torchao import quantization as ao
        from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm as Choose

        group, int4 = ao.PerGroup(128), getattr(torch, "int4")  # noqa: B009 - the stubs lack it
        choose = Choose.HQQ_SCALE_ONLY if hqq else Choose.AFFINE
        config = {
            "W8A8": lambda: ao.Int8DynamicActivationInt8WeightConfig(),
            "W4A8": lambda: ao.Int8DynamicActivationIntxWeightConfig(
                weight_dtype=int4, weight_granularity=group, intx_choose_qparams_algorithm=choose
            ),
            "W4A16": lambda: ao.IntxWeightOnlyConfig(
                weight_dtype=int4, granularity=group, intx_choose_qparams_algorithm=choose
            ),
        }[kind]()
        ao.quantize_(model, config, filter_fn=in_layers)
        return model

    return apply


def torchao_smoothquant(model: nn.Module, tokenizer: Any, texts: list[str]) -> nn.Module:
    """Observers, a pass for the factors, a pass for the scales, conversion."""
    from torchao import quantization as ao
    from torchao.prototype.smoothquant import SmoothQuantConfig
    from torchao.quantization.quantize_.common.quantization_step import QuantizationStep as Step

    base = ao.Int8DynamicActivationInt8WeightConfig()

    def reach(step: Step, after: str) -> None:
        config = SmoothQuantConfig(base, step, use_running_absmax=True)
        ao.quantize_(
            model, config, lambda m, name: type(m).__name__ == after and in_layers(m, name)
        )

    reach(Step.PREPARE, "Linear")
    for step in (Step.PREPARE_FOR_SMOOTHQUANT_SMOOTHING_FACTOR, Step.CONVERT):
        for batch in batches(tokenizer, texts):
            model(**batch)
        reach(step, "SmoothQuantObservedLinear")
    return model


def quanto(weights: str, activations: str | None, hqq: bool = False) -> Peer:
    def apply(model: nn.Module, tokenizer: Any, texts: list[str]) -> nn.Module:
        from optimum import quanto as oq

        kinds = {"qint4": oq.qint4, "qint8": oq.qint8, None: None}
        oq.quantize(
            model, weights=kinds[weights], activations=kinds[activations],
            optimizer=oq.HqqOptimizer() if hqq else None, include="encoder.layer.*",
        )  # fmt: skip
        if activations is not None:
            with oq.Calibration():
                for batch in batches(tokenizer, texts):
                    model(**batch)
        oq.freeze(model)
        return model

    return apply


def llm_compressor(scheme: str, rotate: bool = False) -> Peer:
    """GPTQ on one layer after the other, and after QuIP's Hadamard matrices if asked for.

    Its SmoothQuant and AWQ fold scales into norms, which a post-norm BERT does not allow.
    """

    def apply(model: nn.Module, tokenizer: Any, texts: list[str]) -> nn.Module:
        from datasets import Dataset
        from llmcompressor import oneshot
        from llmcompressor.modifiers.gptq import GPTQModifier
        from llmcompressor.modifiers.transform import QuIPModifier

        recipe: list[Any] = [GPTQModifier(targets="Linear", scheme=scheme, ignore=["pooler.dense"])]
        if rotate:
            recipe.insert(0, QuIPModifier(
                rotations=["v"], transform_block_size=128, transform_type="hadamard",
                ignore=["pooler.dense"],
            ))  # fmt: skip
        rows = [dict(tokenizer(text, truncation=True, max_length=256)) for text in texts]
        oneshot(
            model=model, dataset=Dataset.from_list(rows), recipe=recipe, processor=tokenizer,
            num_calibration_samples=len(rows), max_seq_length=256,
            sequential_targets=["BertLayer"],
        )  # fmt: skip
        return model

    return apply


class _Session(nn.Module):
    """An ONNX Runtime session that answers like the model it was made of."""

    def __init__(self, session: Any, config: Any) -> None:
        super().__init__()
        self.session, self.config = session, config

    def forward(self, **batch: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutput

        names = [i.name for i in self.session.get_inputs()]
        (hidden,) = self.session.run(None, {n: batch[n].numpy() for n in names})
        return BaseModelOutput(last_hidden_state=torch.from_numpy(hidden))


class _Reader:
    """Calibration batches as ONNX Runtime wants them."""

    def __init__(self, found: Iterator[dict[str, Tensor]]) -> None:
        self.found = found

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self.found, None)
        return batch and {n: batch[n].numpy() for n in ("input_ids", "attention_mask")}


def onnx_runtime(kind: str) -> Peer:
    """Its weight matrices' products alone, by channel where it can."""

    def apply(model: nn.Module, tokenizer: Any, texts: list[str]) -> nn.Module:
        import onnx
        import onnxruntime
        from onnxruntime import quantization as oq
        from onnxruntime.quantization import matmul_nbits_quantizer as nbits

        from benchmarks.speed.cpu_contenders import export_onnx

        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder) / "model.onnx", Path(folder) / "quantized.onnx"
            export_onnx(model, "minilm", source)
            options: dict[str, Any] = {
                "op_types_to_quantize": ["MatMul"], "per_channel": True,
                "weight_type": oq.QuantType.QInt8, "extra_options": {"MatMulConstBOnly": True},
            }  # fmt: skip
            if kind == "dynamic":
                oq.quantize_dynamic(source, target, **options)
            elif kind == "static":
                reader = _Reader(batches(tokenizer, texts))
                oq.quantize_static(
                    source, target, reader, activation_type=oq.QuantType.QUInt8, **options
                )
            else:
                hqq = nbits.HQQWeightOnlyQuantConfig(block_size=128, bits=4)
                made = nbits.MatMulNBitsQuantizer(
                    onnx.load(source), bits=4, block_size=128,
                    accuracy_level=4 if kind == "int8 inputs" else None,
                    algo_config=hqq if kind == "hqq" else None,
                )  # fmt: skip
                made.process()
                made.model.save_model_to_file(str(target))
            session = onnxruntime.InferenceSession(str(target))
        return _Session(session, model.config)

    return apply


class _Compiled(nn.Module):
    """A compiled model of OpenVINO that answers like the model it was made of."""

    def __init__(self, compiled: Any, config: Any) -> None:
        super().__init__()
        self.compiled, self.config = compiled, config

    def forward(self, **batch: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutput

        found = self.compiled({n: batch[n].numpy() for n in ("input_ids", "attention_mask")})
        return BaseModelOutput(last_hidden_state=torch.from_numpy(found[self.compiled.outputs[0]]))


def nncf(model: nn.Module, tokenizer: Any, texts: list[str]) -> nn.Module:
    """Its recipe for transformers, which quantizes products in attention as well."""
    import nncf
    import openvino as ov

    from benchmarks.speed.cpu_contenders import export_onnx

    with tempfile.TemporaryDirectory() as folder:
        export_onnx(model, "minilm", Path(folder) / "model.onnx")
        source = ov.convert_model(str(Path(folder) / "model.onnx"))
    reader = _Reader(batches(tokenizer, texts))
    found = nncf.quantize(
        source, nncf.Dataset(list(iter(reader.get_next, None))),
        model_type=nncf.ModelType.TRANSFORMER,
    )  # fmt: skip
    return _Compiled(ov.Core().compile_model(found, "CPU"), model.config)


CASES: list[tuple[str, str, str, Peer]] = [  # bits, package, how, recipe
    ("W8A8", "qtk", "static", ours(w=8, a=8)),
    ("W8A8", "qtk", "best", ours(w=8, a=8, preset="best")),
    ("W8A8", "qtk", "per token", ours(w=8, a=8, activations="token")),
    ("W8A8", "qtk", "best, per token", ours(w=8, a=8, activations="token", preset="best")),
    ("W8A8", "torchao", "per token", torchao("W8A8")),
    ("W8A8", "torchao", "SmoothQuant, per token", torchao_smoothquant),
    ("W8A8", "llmcompressor", "GPTQ, per token", llm_compressor("W8A8")),
    ("W8A8", "llmcompressor", "QuIP, GPTQ, per token", llm_compressor("W8A8", rotate=True)),
    ("W8A8", "optimum-quanto", "static", quanto("qint8", "qint8")),
    ("W8A8", "onnxruntime", "static", onnx_runtime("static")),
    ("W8A8", "onnxruntime", "dynamic", onnx_runtime("dynamic")),
    ("W8A8", "nncf", "NNCF, static", nncf),
    ("W4A8", "qtk", "static", ours(w=4, a=8)),
    ("W4A8", "qtk", "best", ours(w=4, a=8, preset="best")),
    ("W4A8", "qtk", "best, per token, groups of 128",
     ours(w=4, a=8, activations="token", group_size=128, preset="best")),
    ("W4A8", "torchao", "per token, groups of 128", torchao("W4A8")),
    ("W4A8", "torchao", "HQQ, per token, groups of 128", torchao("W4A8", hqq=True)),
    ("W4A8", "llmcompressor", "GPTQ, per token, groups of 128", llm_compressor("W4A8")),
    ("W4A8", "llmcompressor", "QuIP, GPTQ, per token, groups of 128",
     llm_compressor("W4A8", rotate=True)),
    ("W4A8", "optimum-quanto", "static, groups of 128", quanto("qint4", "qint8")),
    ("W4A8", "onnxruntime", "dynamic, groups of 128", onnx_runtime("int8 inputs")),
    ("W4A16", "qtk", "groups of 128", ours(w=4, a=16, group_size=128)),
    ("W4A16", "qtk", "asymmetric, groups of 128",
     ours(w=4, a=16, group_size=128, weights="asymmetric")),
    ("W4A16", "torchao", "groups of 128", torchao("W4A16")),
    ("W4A16", "torchao", "HQQ, groups of 128", torchao("W4A16", hqq=True)),
    ("W4A16", "llmcompressor", "GPTQ, groups of 128", llm_compressor("W4A16")),
    ("W4A16", "llmcompressor", "asymmetric GPTQ, groups of 128", llm_compressor("W4A16_ASYM")),
    ("W4A16", "llmcompressor", "QuIP, GPTQ, groups of 128", llm_compressor("W4A16", rotate=True)),
    ("W4A16", "optimum-quanto", "groups of 128", quanto("qint4", None)),
    ("W4A16", "optimum-quanto", "HQQ, groups of 128", quanto("qint4", None, hqq=True)),
    ("W4A16", "onnxruntime", "groups of 128", onnx_runtime("nearest")),
    ("W4A16", "onnxruntime", "HQQ, groups of 128", onnx_runtime("hqq")),
    ("W4A4", "qtk", "static", ours(w=4, a=4)),
    ("W4A4", "qtk", "per token", ours(w=4, a=4, activations="token")),
    ("W4A4", "qtk", "per token, groups of 128",
     ours(w=4, a=4, activations="token", group_size=128)),
    ("W4A4", "llmcompressor", "GPTQ, per token, groups of 128", llm_compressor("W4A4")),
    ("W4A4", "llmcompressor", "QuIP, GPTQ, per token, groups of 128",
     llm_compressor("W4A4", rotate=True)),
]  # fmt: skip
MISSING = "not installed"
NAMES = {"llmcompressor": "llm-compressor", "onnxruntime": "ONNX Runtime", "nncf": "OpenVINO"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--packages", nargs="+", help="measure these again, keep the rest")
    parser.add_argument("--resume", action="store_true", help="keep all figures that are there")
    options = parser.parse_args()
    model, tokenizer = data.minilm()
    task = data.stsb_test(tokenizer)
    wanted = task.embeddings(model)

    @torch.no_grad()
    def figures(peer: Peer) -> list[float]:
        qmodel = peer(copy.deepcopy(model), tokenizer, data.stsb_calibration(0))
        got = task.embeddings(qmodel)
        cosines = (got * wanted).sum(-1)
        return [float(cosines.mean()), float(cosines.min()), task.spearman(got)]

    old = read("fidelity_peers") if options.resume or options.packages else {}
    again = [] if options.resume else [NAMES.get(p, p) for p in options.packages or ()]
    kept = (row for row in old.get("rows", ()) if row[3] != MISSING and row[1] not in again)
    rows: dict[tuple[str, ...], Row] = {tuple(row[:3]): row for row in kept}
    for bits, package, how, peer in CASES:
        key = (bits, NAMES.get(package, package), how)
        if package in (options.packages or [package]) and key not in rows:
            rows[key] = [*key, *measured(package, peer, figures)]
            print("  ".join(rows[key]), file=sys.stderr, flush=True)
        keep(rows, old)


def measured(package: str, peer: Peer, figures: Callable[[Peer], list[float]]) -> Row:
    """The package's version, or that there is none, and the figures."""
    try:
        release = qtk.__version__ if package == "qtk" else version(package)
    except PackageNotFoundError:
        return [MISSING, "", "", ""]
    try:
        cosine, worst, spearman = figures(peer)
    except Exception as error:  # a peer's failure on this model is a result
        first = "".join(str(error).strip().splitlines()[:1])[:60]
        return [release, f"fails: {type(error).__name__}", first, ""]
    return [release, f"{cosine:.4f}", f"{worst:.3f}", f"{spearman:.2f}"]


def keep(rows: dict[tuple[str, ...], Row], old: dict[str, Any]) -> None:
    """Writes the rows in the order of the cases; some may be of an earlier result."""
    order = [(bits, NAMES.get(package, package), how) for bits, package, how, _ in CASES]
    found = result(
        "MiniLM beside its peers, STS-B test",
        ["bits", "who", "how", "version", "cosine", "worst", "STS-B Spearman"],
        [rows[key] for key in order if key in rows],
        "the linears of all six layers; 256 sentences of STS-B train where a recipe calibrates, "
        "draw 0. GPTQModel has no BERT: see its own table",
        kept=old,
    )
    write("fidelity_peers", found)


if __name__ == "__main__":
    main()
