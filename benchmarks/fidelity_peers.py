"""qtk beside its peers: the same weights, sentences and metric, each peer by its documented recipe.

    python -m benchmarks.fidelity_peers [--resume] [--packages NAME ...]

MiniLM on STS-B test, the linears of the six layers, calibration draw 0 where a recipe calibrates. A
peer that is not installed has a row that says so. Into
benchmarks/results/fidelity_peers.json.
"""

import argparse
import copy
import json
import re
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import data
from benchmarks.fidelity import RESULTS, quantize, result

Peer = Callable[[nn.Module, Any, list[str]], nn.Module]  # model, tokenizer, sentences -> quantized
LAYERS = re.compile(r"encoder\.layer\.\d+\..*")


def in_layers(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and LAYERS.fullmatch(name) is not None


def ours(**options: Any) -> Peer:
    return lambda model, tokenizer, texts: quantize(model, texts, options, 0, tokenizer=tokenizer)


def torchao(kind: str) -> Peer:
    def apply(model: nn.Module, tokenizer: Any, texts: list[str]) -> nn.Module:
        from torchao import quantization as ao

        group, int4 = ao.PerGroup(128), getattr(torch, "int4")  # noqa: B009 - the stubs lack it
        config = {
            "W8A8": lambda: ao.Int8DynamicActivationInt8WeightConfig(),
            "W4A8": lambda: ao.Int8DynamicActivationIntxWeightConfig(
                weight_dtype=int4, weight_granularity=group
            ),
            "W4A16": lambda: ao.IntxWeightOnlyConfig(weight_dtype=int4, granularity=group),
        }[kind]()
        ao.quantize_(model, config, filter_fn=in_layers)
        return model

    return apply


def quanto(weights: str, activations: str | None) -> Peer:
    def apply(model: nn.Module, tokenizer: Any, texts: list[str]) -> nn.Module:
        from optimum import quanto as oq

        kinds = {"qint4": oq.qint4, "qint8": oq.qint8, None: None}
        oq.quantize(
            model, weights=kinds[weights], activations=kinds[activations], include="encoder.layer.*"
        )
        if activations is not None:
            with oq.Calibration(), torch.no_grad():
                for i in range(0, len(texts), 32):
                    model(**tokenizer(texts[i : i + 32], padding=True, return_tensors="pt"))
        oq.freeze(model)
        return model

    return apply


def llm_compressor(scheme: str) -> Peer:
    def apply(model: nn.Module, tokenizer: Any, texts: list[str]) -> nn.Module:
        from datasets import Dataset
        from llmcompressor import oneshot
        from llmcompressor.modifiers.quantization import GPTQModifier

        recipe: list[Any] = [GPTQModifier(targets="Linear", scheme=scheme, ignore=["pooler.dense"])]
        rows = [dict(tokenizer(text, truncation=True, max_length=256)) for text in texts]
        oneshot(
            model=model, dataset=Dataset.from_list(rows), recipe=recipe, processor=tokenizer,
            num_calibration_samples=len(rows), max_seq_length=256, pipeline="basic",
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


def onnx_runtime(model: nn.Module, tokenizer: Any, texts: list[str]) -> nn.Module:
    """Dynamic int8, as its quantize_dynamic does it."""
    import tempfile

    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    from benchmarks.cpu_contenders import export_onnx

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "model.onnx", Path(folder) / "int8.onnx"
        export_onnx(model, "minilm", source)
        quantize_dynamic(source, target, weight_type=QuantType.QInt8)
        session = onnxruntime.InferenceSession(str(target))
    return _Session(session, model.config)


CASES: list[tuple[str, str, str, Peer]] = [  # bits, who, package, how
    ("W8A8", "qtk, static", "qtk", ours(w=8, a=8)),
    ("W8A8", "qtk, best", "qtk", ours(w=8, a=8, preset="best")),
    ("W8A8", "qtk, token", "qtk", ours(w=8, a=8, activations="token")),
    ("W8A8", "torchao, token", "torchao", torchao("W8A8")),
    ("W8A8", "llm-compressor, GPTQ, token", "llmcompressor", llm_compressor("W8A8")),
    ("W8A8", "optimum-quanto, static", "optimum-quanto", quanto("qint8", "qint8")),
    ("W8A8", "ONNX Runtime, dynamic", "onnxruntime", onnx_runtime),
    ("W4A8", "qtk, static", "qtk", ours(w=4, a=8)),
    ("W4A8", "qtk, best", "qtk", ours(w=4, a=8, preset="best")),
    ("W4A8", "qtk, token, groups of 128", "qtk",
     ours(w=4, a=8, activations="token", group_size=128, preset="best")),
    ("W4A8", "torchao, token, groups of 128", "torchao", torchao("W4A8")),
    ("W4A8", "llm-compressor, GPTQ, token, groups of 128", "llmcompressor",
     llm_compressor("W4A8")),
    ("W4A8", "optimum-quanto, static", "optimum-quanto", quanto("qint4", "qint8")),
    ("W4A16", "qtk, groups of 128", "qtk", ours(w=4, a=16, group_size=128)),
    ("W4A16", "torchao, groups of 128", "torchao", torchao("W4A16")),
    ("W4A16", "llm-compressor, GPTQ, groups of 128", "llmcompressor",
     llm_compressor("W4A16")),
    ("W4A16", "optimum-quanto", "optimum-quanto", quanto("qint4", None)),
    ("W4A4", "qtk, static", "qtk", ours(w=4, a=4)),
    ("W4A4", "qtk, token", "qtk", ours(w=4, a=4, activations="token")),
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--packages", nargs="+", help="measure only these")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there")
    options = parser.parse_args()
    model, tokenizer = data.minilm()
    task = data.stsb_test(tokenizer)
    wanted = task.embeddings(model)

    def figures(peer: Peer) -> list[float]:
        qmodel = peer(copy.deepcopy(model), tokenizer, data.stsb_calibration(0))
        got = task.embeddings(qmodel)
        cosines = (got * wanted).sum(-1)
        return [float(cosines.mean()), float(cosines.min()), task.spearman(got)]

    path = RESULTS / "fidelity_peers.json"
    rows: dict[tuple[str, str], list[str]] = {}
    if options.resume and path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))["rows"]
        rows = {(row[0], row[1]): row for row in kept}
    for bits, who, package, peer in CASES:
        if package not in (options.packages or [package]):
            continue
        name = named(who, package)
        if (bits, name) not in rows:
            rows[bits, name] = [bits, name, *measured(peer, figures, name)]
            print("  ".join(rows[bits, name]), file=sys.stderr, flush=True)
            order = {
                (bits, named(who, package)): i for i, (bits, who, package, _) in enumerate(CASES)
            }
            write(path, sorted(rows.values(), key=lambda row: order[row[0], row[1]]))


def named(who: str, package: str) -> str:
    """With the version, or that there is none."""
    try:
        return who if package == "qtk" else f"{who} ({version(package)})"
    except PackageNotFoundError:
        return f"{who} (not installed)"


def measured(peer: Peer, figures: Callable[[Peer], list[float]], name: str) -> list[str]:
    if name.endswith("(not installed)"):
        return ["", "", ""]
    try:
        cosine, worst, spearman = figures(peer)
    except Exception as error:  # a peer's failure on this model is a result
        first = "".join(str(error).strip().splitlines()[:1])[:60]
        return [f"fails: {type(error).__name__}", first, ""]
    return [f"{cosine:.4f}", f"{worst:.3f}", f"{spearman:.2f}"]


def write(path: Path, rows: list[list[str]]) -> None:
    written = result(
        "MiniLM beside its peers, STS-B test",
        ["bits", "who", "cosine", "worst", "STS-B Spearman"],
        rows,
        "the linears of all six layers but for ONNX Runtime, which takes all; 256 sentences of "
        "STS-B train where a recipe calibrates, draw 0. GPTQModel: not measured, it needs CUDA "
        "packages",
    )
    text = json.dumps(written, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
