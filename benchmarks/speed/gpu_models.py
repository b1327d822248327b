"""Whole models on a GPU: half precision as it is run today against quantized.

    python -m benchmarks.speed.gpu_models [--minutes 9] [--model NAME] [--batch N] [--resume]

BERT-base, ViT-B and OPT-1.3b with random weights: for speed only. Full batches are timed as CUDA
graphs; bfloat16 is compiled, ours needs no compiler. Batches of sentences of mixed lengths are
timed as the host launches them, because where padding is left out depends on the batch; beside ours
stands float16 with FlashAttention-2 and without padding. Medians on the device. Writes
benchmarks/results/gpu_models_<device>.json, row by row; a run replaces the rows of its model and
batch, or goes on behind them. Without a GPU it says so.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import qtk
from benchmarks.result import RESULTS, Row, read, result, write
from benchmarks.speed.gpu_device import RESTART, file_of, has_gpu, head, same_head, this_run
from benchmarks.speed.gpu_unpadded import Unpadded
from qtk_kernels.tune import answers, microseconds, said

DEVICE = "cuda"
BATCHES = (8, 1, 64)
TOKENS = 128
SCHEMES: dict[str, dict[str, Any]] = {
    "qtk W8A8": {"w": 8, "a": 8},
    "qtk W8A8 per token": {"w": 8, "a": 8, "activations": "token"},
    "qtk W4A8": {"w": 4, "a": 8},
    "qtk W4A16 g128": {"w": 4, "a": 16, "group_size": 128},
}
BFLOAT16, FLOAT16 = "bfloat16, compiled", "float16, FlashAttention-2, unpadded"
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


def mixed(inputs: Inputs) -> Inputs:
    """Sentences of an eighth of the length to all of it."""
    mask = inputs["attention_mask"]
    lengths = torch.linspace(mask.shape[1] / 8, mask.shape[1], len(mask)).int()
    return {**inputs, "attention_mask": (torch.arange(mask.shape[1]) < lengths[:, None]).long()}


MODELS = {"BERT-base": bert, "ViT-B": vit, "OPT-1.3b": opt}


def on_device(inputs: Inputs, dtype: torch.dtype = torch.bfloat16) -> Inputs:
    """Floats as the models are."""
    return {
        name: x.to(DEVICE, dtype if x.is_floating_point() else x.dtype)
        for name, x in inputs.items()
    }


def time_of(model: nn.Module, inputs: Inputs, compiled: bool, graph: bool) -> float:
    """Milliseconds of a forward pass."""
    run = torch.compile(model, fullgraph=True) if compiled and DEVICE == "cuda" else model
    with torch.no_grad():
        return microseconds([lambda: run(**inputs)], graph=graph) / 1e3


def measured(
    name: str, batch: int, end: float, known: Sequence[Row] = (), few: int | None = None
) -> Iterator[Row]:
    """Lines of all contenders: of a full batch, and for BERT of one of mixed lengths.

    A line comes twice: as what stays if the process ends here, and with the time or the error.

    Args:
        known: lines of an earlier run, which are not measured again.
        few: how many contenders; None for all.
    """
    torch.manual_seed(0)
    model, make = MODELS[name]()
    model = model.eval().to(DEVICE)
    given = make(batch)
    batches = {"full": given}
    if isinstance(model, transformers.BertModel) and batch > 1:
        batches["mixed"] = mixed(given)
    base = {row[2]: float(row[4]) for row in known if row[3] == BFLOAT16 and row[4]}
    for what in (BFLOAT16, "qtk W8A8", FLOAT16, *list(SCHEMES)[1:])[:few]:
        if time.monotonic() > end:
            print(f"out of time: {what} of {name} was not measured", flush=True)
            break
        runs = None
        for lengths in batches if what != FLOAT16 else set(batches) & {"mixed"}:
            line = [name, str(batch), lengths, what]
            if line in [row[:4] for row in known]:
                continue
            yield [*line, "", "ended the process"]
            torch._dynamo.reset()
            try:
                runs = contender(what, model, make) if runs is None else runs
                ms = milliseconds(what, runs, batches[lengths], lengths)
            except Exception as error:  # the others are still to be measured
                yield [*line, "", said(error)]
                if not answers(torch.device(DEVICE)):
                    return
                continue
            base.setdefault(lengths, ms)
            yield [*line, f"{ms:.3f}", f"{base[lengths] / ms:.2f}x"]


def contender(what: str, model: nn.Module, make: Callable[[int], Inputs]) -> nn.Module:
    if what == BFLOAT16:
        return copy_of(model, torch.bfloat16)
    if what == FLOAT16:
        return copy_of(model, torch.float16)
    calib = [{key: x.to(DEVICE) for key, x in make(2).items()}]
    found = qtk.quantize(model, calib=calib, progress=False, **FAST, **SCHEMES[what])
    return found.to(torch.bfloat16)


def milliseconds(what: str, model: nn.Module, inputs: Inputs, lengths: str) -> float:
    if what == FLOAT16:
        inputs = on_device(inputs, torch.float16)
        model = Unpadded(model, inputs["attention_mask"])
    else:
        inputs = on_device(inputs)
    return time_of(model, inputs, what == BFLOAT16, lengths == "full")


def copy_of(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """In half precision; the float32 model is still to be quantized."""
    half = type(model)(deepcopy(model.config)).eval().to(DEVICE)
    half.load_state_dict(model.state_dict())
    return half.to(dtype)


def table(rows: list[Row], top: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    return result(
        "Whole models on a GPU",
        ["model", "batch", "lengths", "what", "ms", "over bfloat16, compiled"],
        rows,
        f"random weights, {TOKENS} tokens (ViT: 197), or {TOKENS // 8} to {TOKENS} where lengths "
        "are mixed; full batches as CUDA graphs, mixed ones launched by the host; medians on the "
        "device",
        kept=old,
        **top,
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--model", choices=list(MODELS))
    parser.add_argument("--batch", type=int, choices=BATCHES)
    parser.add_argument("--few", type=int, help="this many contenders")
    parser.add_argument("--resume", action="store_true", help="keep the rows that there are")
    options = parser.parse_args(arguments)
    if not has_gpu():
        print("No GPU: nothing is measured.")
        return 0
    end, run = time.monotonic() + 60 * options.minutes, this_run()
    top, file = head(run), file_of("gpu_models", run)
    old = read(file, RESULTS)
    old = old if same_head(old, top) else {}
    rows = old.get("rows", [])
    for name in [options.model] if options.model else MODELS:
        for batch in [options.batch] if options.batch else BATCHES:
            mine = [row for row in rows if row[:2] == [name, str(batch)]]
            rows = [row for row in rows if options.resume or row not in mine]
            for row in measured(name, batch, end, mine if options.resume else (), options.few):
                print(*row, flush=True)
                rows = [*(r for r in rows if r[:4] != row[:4]), row]
                write(file, table(rows, top, old), RESULTS)
            if not answers(torch.device(DEVICE)):
                return RESTART
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
