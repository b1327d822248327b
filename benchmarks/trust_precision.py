"""Random precision: what switching costs, and whether drawn bits are harder to attack.

    python -m benchmarks.trust_precision cost | vit | trained ... [--images N] [--trained N]
                                         [--epochs E] [--width W] [--bits BITS ...]
                                         [--folder FOLDER]

writes benchmarks/results/trust_precision.json, whose other figures stay.

cost     CPU time of a switch over that of a batch at 8 bits, and bytes held over the model's
vit      the small ViT, quantized after training: who attacks, who answers
trained  PreActResNets of examples/random_precision.py, trained under attack at fixed and at random
         bits: each of --bits is a network, such as 8 or 4,6,8
"""

import argparse
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qtk
from benchmarks.result import read, result, write
from benchmarks.trust_robust import NORMALIZE, pixels, quantized
from examples.random_precision import attacked
from qtk.assembly import fused_blocks
from qtk.modules.linear import QuantLinear
from qtk.robust import RandomPrecision, Transfer, precision_transfer

COLUMNS = ["figure", "value"]
BATCHES = (64, 256)
TURNS = 5
NOTES = (
    "PGD, steps of 2.5 budgets over their number, no early stop, linf; a defender draws ten times, "
    "mean and standard deviation; best fixed: right most often under the attack made for it; cost: "
    "least CPU time of five turns, one thread of a machine that had other work"
)
Rows = list[list[str]]


def cost(args: argparse.Namespace) -> Iterator[Rows]:
    model: Any = quantized(8, args.folder)
    fixed = _bytes(model, [])
    for keep in (False, True):
        random = qtk.random_precision(model, draw="batch", keep=keep)
        what = f"cost, {'every precision kept' if keep else 'prepared at each switch'}"
        rows = []
        for batch in BATCHES:
            switch, alone = _dearest(random, torch.randn(batch, 3, 32, 32))
            told = f"{1000 * switch:.1f} ms, {100 * switch / alone:.1f} % of {1000 * alone:.0f} ms"
            rows.append([f"{what}: the dearest switch, beside a batch of {batch} at 8 bits", told])
        held = _bytes(random.model, random.tensors())
        rows.append(
            [f"{what}: bytes held over those of the model at 8 bits", f"{held / fixed:.2f}"]
        )
        random.switch(8)
        yield rows


def vit(args: argparse.Namespace) -> Iterator[Rows]:
    model: Any = quantized(8, args.folder)
    random = qtk.random_precision(model, bits=(4, 6, 8), keep=True)
    found = precision_transfer(
        random, *pixels("test", args.images), normalize=NORMALIZE, budget=0.5 / 255, steps=10
    )
    print(found.table(), flush=True)
    yield _told(f"ViT, {args.images} images, .5/255, PGD-10", found)


def trained(args: argparse.Namespace) -> Iterator[Rows]:
    train, test = pixels("train", args.trained), pixels("test", args.images)
    for text in args.bits:
        bits = tuple(int(b) for b in text.split(","))
        found = attacked(train, test, bits, epochs=args.epochs, width=args.width)
        print(text, found.table(), sep="\n", flush=True)
        yield _told(
            f"PreActResNet trained at {text} bits, {args.trained} images, {args.epochs} epochs, "
            f"8/255, PGD-20, {args.images} images", found,
        )  # fmt: skip


def _told(what: str, found: Transfer) -> Rows:
    rows = []
    for name, fixed, (mean, std), (low, high) in zip(
        found.attacks, found.accuracy, found.drawn, found.intervals, strict=True
    ):
        cells = ", ".join(
            f"{100 * v:.1f} at {b} bits" for b, v in zip(found.bits, fixed, strict=True)
        )
        text = f"{cells}; drawn {100 * mean:.1f} +- {100 * std:.1f} ({100 * low:.1f} to "
        rows.append([f"{what}: attack {name}, right in %", f"{text}{100 * high:.1f})"])
    return [*rows, [f"{what}: best fixed", f"{found.best_fixed} bits"]]


def _dearest(random: RandomPrecision, x: Tensor) -> tuple[float, float]:
    """Seconds of the dearest switch from 8 bits, and of a batch at 8 bits."""
    alone, switch = _least(partial(random.at, 8, pixel_values=x)), 0.0
    for bits in random.bits[:-1]:
        back, there = partial(random.switch, 8), partial(random.switch, bits)
        switch = max(switch, _least(there, back))
    return switch, alone


@torch.no_grad()
def _least(run: Callable[[], Any], before: Callable[[], Any] = lambda: None) -> float:
    """Seconds of CPU."""
    run()
    found = []
    for _ in range(TURNS):
        before()
        start = time.process_time()
        run()
        found.append(time.process_time() - start)
    return min(found)


def _bytes(model: Any, others: Iterable[Tensor]) -> int:
    """Of every tensor that a model and its fused blocks hold, and of others, each storage once."""
    parts: list[Any] = [m for m in model.modules() if isinstance(m, QuantLinear)]
    parts += fused_blocks(model).values()
    held = [*model.parameters(), *model.buffers(), *others]
    held += [tensor for part in parts for tensor in part.tensors()]
    return sum({_place(t): _size(t) for t in held}.values())


def _place(t: Tensor) -> int:
    return id(t) if t.is_mkldnn else t.untyped_storage().data_ptr()


def _size(t: Tensor) -> int:
    return t.numel() * t.element_size() if t.is_mkldnn else t.untyped_storage().nbytes()


PARTS = {"cost": cost, "vit": vit, "trained": trained}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("parts", nargs="*", default=list(PARTS))
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--trained", type=int, default=8000)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--bits", nargs="+", default=["8", "4", "4,6,8"])
    parser.add_argument("--folder", type=Path, default=Path("trust-out"))
    args = parser.parse_args()
    for part in args.parts:
        for made in PARTS[part](args):
            kept = read("trust_precision")
            known = {row[0]: row for row in [*kept.get("rows", []), *made]}
            found = result("Random precision", COLUMNS, list(known.values()), NOTES, kept=kept)
            write("trust_precision", found)


if __name__ == "__main__":
    main()
