"""Whole models on a GPU: bfloat16 under torch.compile against quantized, at batch 1, 8 and 64.

    python -m benchmarks.speed.gpu_models [--minutes 9] [--model NAME]

BERT-base, ViT-B and OPT-1.3b with random weights: for speed only. Both sides are compiled and timed
alike, as CUDA graphs, medians on the device. Writes benchmarks/results/gpu_models.json; rows of
models that a run does not reach stay. Without a GPU it says so.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import qtk
from benchmarks.result import RESULTS, Row, read, result, write
from benchmarks.speed.gpu_device import head, this_run
from qtk_kernels.tune import microseconds

DEVICE = "cuda"
BATCHES = (1, 8, 64)
TOKENS = 128
SCHEMES: dict[str, dict[str, Any]] = {
    "qtk W8A8": {"w": 8, "a": 8},
    "qtk W8A8 per token": {"w": 8, "a": 8, "activations": "token"},
    "qtk W4A8": {"w": 4, "a": 8},
    "qtk W4A16 g128": {"w": 4, "a": 16, "group_size": 128},
}
FAST: dict[str, Any] = {"rounding": "nearest"}  # weights are random: for speed only
Inputs = dict[str, Tensor]


def bert() -> tuple[nn.Module, Callable[[int], Inputs]]:
    return transformers.BertModel(transformers.BertConfig()), ids


def vit() -> tuple[nn.Module, Callable[[int], Inputs]]:
    def pixels(batch: int) -> Inputs:
        return {"pixel_values": torch.randn(batch, 3, 224, 224)}

    return transformers.ViTModel(transformers.ViTConfig()), pixels


def opt() -> tuple[nn.Module, Callable[[int], Inputs]]:
    config = transformers.OPTConfig(
        hidden_size=2048, ffn_dim=8192, num_attention_heads=32, num_hidden_layers=24,
        word_embed_proj_dim=2048,
    )  # fmt: skip
    config.use_cache = False
    return transformers.OPTModel(config), ids


def ids(batch: int) -> Inputs:
    tokens = torch.randint(1000, 20000, (batch, TOKENS))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


MODELS = {"BERT-base": bert, "ViT-B": vit, "OPT-1.3b": opt}


def on_device(inputs: Inputs) -> Inputs:
    """Floats in bfloat16, as the models are."""
    return {
        name: x.to(DEVICE, torch.bfloat16 if x.is_floating_point() else x.dtype)
        for name, x in inputs.items()
    }


def time_of(model: nn.Module, inputs: Inputs) -> float:
    """Milliseconds of a forward pass."""
    compiled = torch.compile(model, fullgraph=True) if DEVICE == "cuda" else model
    with torch.no_grad():
        return microseconds([lambda: compiled(**inputs)]) / 1e3


def measured(name: str, end: float) -> Iterator[Row]:
    """A line per batch and contender."""
    torch.manual_seed(0)
    model, make = MODELS[name]()
    model = model.eval().to(DEVICE)
    calib = [{key: x.to(DEVICE) for key, x in make(2).items()}]
    batches = {batch: on_device(make(batch)) for batch in BATCHES}
    base: dict[int, float] = {}
    for what, options in {"bfloat16, compiled": {}, **SCHEMES}.items():
        if time.monotonic() > end:
            print(f"out of time: {what} of {name} was not measured", flush=True)
            break
        runs = model
        if options:
            runs = qtk.quantize(model, calib=calib, progress=False, **FAST, **options)
        runs = runs.to(torch.bfloat16) if options else _copy(model)
        for batch, inputs in batches.items():
            torch._dynamo.reset()
            try:
                ms = time_of(runs, inputs)
            except Exception as error:  # the others are still to be measured
                print(f"{what} of {name}, batch {batch}: {type(error).__name__}: {error}")
                continue
            base.setdefault(batch, ms)
            yield [name, str(batch), what, f"{ms:.3f}", f"{base[batch] / ms:.2f}x"]


def _copy(model: nn.Module) -> nn.Module:
    """In bfloat16; the float32 model is still to be quantized."""
    half = type(model)(model.config).eval().to(DEVICE)
    half.load_state_dict(model.state_dict())
    return half.to(torch.bfloat16)


def table(rows: list[Row], top: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    return result(
        "Whole models on a GPU",
        ["model", "batch", "what", "ms", "over bfloat16, compiled"],
        rows,
        f"random weights, {TOKENS} tokens (ViT: 197); both compiled, timed as CUDA "
        "graphs, medians on the device",
        kept=old,
        **top,
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--model", choices=list(MODELS))
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("No GPU: nothing is measured.")
        return 0
    end, top = time.monotonic() + 60 * options.minutes, head(this_run())
    old = read("gpu_models", RESULTS)
    if any(old.get(key) != value for key, value in top.items()):
        old = {}
    rows = old.get("rows", [])
    for name in [options.model] if options.model else MODELS:
        rows = [row for row in rows if row[0] != name]
        for row in measured(name, end):
            print(*row, flush=True)
            rows.append(row)
            write("gpu_models", table(rows, top, old), RESULTS)
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
