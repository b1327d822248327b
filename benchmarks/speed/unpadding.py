"""What leaving padding out is worth: STS-B sentences of mixed lengths through MiniLM.

    python -m benchmarks.speed.unpadding [--preset PRESET]

Batches in the order of the file, and sorted by length, as sentence-transformers sorts them; the
same quantized model with and without its padding, and the float model, take turns. Writes
benchmarks/results/unpadding.json.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch

import qtk
from benchmarks import data
from benchmarks.result import Row, result, write
from qtk.modules.fused import packing
from qtk.timing import race

SENTENCES, BATCH = 512, 64
SCHEMES = {"W8A8": (8, 8), "W7A8": (7, 8)}


def batches(tokenizer: Any, is_sorted: bool) -> list[dict[str, torch.Tensor]]:
    texts = data.stsb_sentences("test", 0, SENTENCES)
    if is_sorted:
        texts = sorted(texts, key=lambda text: -len(tokenizer(text)["input_ids"]))
    parts = [texts[i : i + BATCH] for i in range(0, len(texts), BATCH)]
    return [dict(tokenizer(part, padding=True, return_tensors="pt")) for part in parts]


@torch.no_grad()
def measured(models: dict[str, Any], given: list[dict[str, torch.Tensor]], order: str) -> Row:
    """A row of sentences a second."""

    def all_of(model: Any, worth: float) -> Callable[[], Any]:
        def call() -> None:
            packing.WORTH = worth
            packing._found.clear()
            for batch in given:
                model(**batch)

        return call

    usual = packing.WORTH
    calls = {"float32": all_of(models["float32"], usual)}
    for name in SCHEMES:
        calls[f"{name} padded"] = all_of(models[name], 0.0)
        calls[name] = all_of(models[name], usual)
    try:
        times = race(calls, rounds=7, warmup=1, limit=240.0)
    finally:
        packing.WORTH = usual
    masks = [batch["attention_mask"] for batch in given]
    share = sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
    return [order, f"{share:.2f}", *(f"{SENTENCES / times[name]:.0f}" for name in calls)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--preset", default="fast")
    preset = parser.parse_args().preset
    model, tokenizer = data.minilm()
    calib = data.stsb_calibration(0, 64)
    models = {"float32": model}
    for name, (w, a) in SCHEMES.items():
        models[name] = qtk.quantize(
            model, w, a, calib=calib, tokenizer=tokenizer, preset=preset, progress=False
        )
    rows = [
        measured(models, batches(tokenizer, is_sorted), order)
        for order, is_sorted in (("as they come", False), ("sorted by length", True))
    ]
    columns = ["order", "tokens that count", "float32"]
    columns += [column for name in SCHEMES for column in (f"{name} padded", name)]
    notes = (
        f"sentences a second, {SENTENCES} sentences of STS-B test in batches of {BATCH}; medians "
        f"of seven interleaved passes; preset {preset}"
    )
    write("unpadding", result("MiniLM with padding left out", columns, rows, notes))
    for row in rows:
        print(*row)


if __name__ == "__main__":
    main()
