"""A small OPT at W4A16 beside GPTQModel, which knows decoders only.

    GPTQMODEL_CPU_WORKERS=2 python -m benchmarks.accuracy.gptqmodel

The same weights, windows and metric as `benchmarks.accuracy.models opt`, draw 0, in one process;
GPTQModel by its own quantize, save and load, on a CPU. It writes
benchmarks/results/fidelity_gptqmodel.json.
"""

import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import nn

import qtk
from benchmarks import data
from benchmarks.accuracy.models import WINDOWS
from benchmarks.accuracy.table import quantize
from benchmarks.result import result, write

GROUP = {"w": 4, "a": 16, "group_size": 128}
OURS: list[tuple[str, dict[str, Any]]] = [
    ("nearest", {**GROUP, "rounding": "nearest"}),
    ("default", GROUP),
    ("asymmetric", {**GROUP, "weights": "asymmetric"}),
]
THEIRS: list[tuple[str, dict[str, Any]]] = [
    ("GPTQ, default", {}),
    ("GPTQ, asymmetric", {"sym": False}),
    ("GPTQ, activation order", {"desc_act": True}),
]


def gptqmodel(folder: Path, out: Path, **options: Any) -> nn.Module:
    """The model in `folder` by GPTQModel's recipe, read back from where that saved it."""
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    model = GPTQModel.load(str(folder), QuantizeConfig(bits=4, group_size=128, **options))
    rows = [row for batch in data.opt_calibration(0) for row in batch["input_ids"].tolist()]
    model.quantize([{"input_ids": r, "attention_mask": [1] * len(r)} for r in rows], batch_size=16)
    model.save(str(out))
    read: nn.Module = GPTQModel.load(str(out), device="cpu", backend=BACKEND.TORCH).model
    return read


def main() -> None:
    model: Any
    model, tokenizer = data.opt()
    model = data.inject_outliers(model)
    base = data.perplexity(model, WINDOWS)
    rows = [["float32", "", "", f"{base:.2f}", ""]]

    def measured(who: str, how: str, release: str, qmodel: nn.Module) -> None:
        perplexity = data.perplexity(qmodel, WINDOWS)
        over = f"{100 * (perplexity / base - 1):+.2f} %"
        rows.append([who, how, release, f"{perplexity:.2f}", over])
        print("  ".join(rows[-1]), flush=True)

    for how, options in OURS:
        qmodel = quantize(model, data.opt_calibration(0), options, 0)
        measured("qtk", how, qtk.__version__, qmodel)
    release = _version()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "float"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for i, (how, options) in enumerate(THEIRS):
            qmodel = gptqmodel(folder, Path(temporary) / str(i), **options)
            measured("GPTQModel", how, release, qmodel)
    written = result(
        "Small OPT with injected outlier channels at W4A16 beside GPTQModel, WikiText-2 test",
        ["who", "how", "version", "perplexity", "over float"],
        rows,
        f"groups of 128; the first {WINDOWS} windows of 256 tokens, calibrated on 64 windows of "
        "WikiText-2 valid, draw 0; GPTQModel has no BERT and no ViT",
    )
    write("fidelity_gptqmodel", written)


def _version() -> str:
    """GPTQModel's, installed or run from its sources."""
    try:
        return version("gptqmodel")
    except PackageNotFoundError:
        from gptqmodel.version import __version__

        return str(__version__)


if __name__ == "__main__":
    main()
