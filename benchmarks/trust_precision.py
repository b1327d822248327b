"""Random precision: what switching costs, and whether drawn bits are harder to attack.

    python -m benchmarks.trust_precision cost | vit | trained ... [--images N] [--trained N]
                                         [--epochs E] [--width W] [--bits BITS ...]
                                         [--folder FOLDER]

writes benchmarks/results/trust_precision.json, whose other figures stay.

cost     CPU time of a batch at drawn bits over one at 8, and bytes held over those at 8
vit      the small ViT, quantized after training: who attacks, who answers
trained  PreActResNets of random_precision.py, trained under attack at fixed and at random bits:
         each of --bits is a network, such as 8 or 4,6,8
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
from benchmarks import random_precision
from benchmarks.result import read, result, write
from benchmarks.trust_robust import NORMALIZE, pixels, quantized
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
    random = qtk.random_precision(model, draw="batch")
    rows = []
    for batch in BATCHES:
        x = torch.randn(batch, 3, 32, 32)
        fixed, drawn = _least(partial(random.at, 8, pixel_values=x)), 0.0
        for bits in random.bits[:-1]:  # each turn comes from 8 and pays a switch
            run = partial(random.at, bits, pixel_values=x)
            drawn = max(drawn, _least(run, partial(random.switch, 8)) - _least(run))
        told = f"{1000 * drawn:.0f} ms, {100 * drawn / fixed:.1f} % of {1000 * fixed:.0f} ms"
        rows.append([f"cost: the dearest switch, beside a batch of {batch} at 8 bits", told])
    random.switch(8)
    at_eight = _bytes(random)
    random.switch(4)
    rows.append(["cost: bytes held at 4 bits over those at 8", f"{_bytes(random) / at_eight:.2f}"])
    yield rows


def vit(args: argparse.Namespace) -> Iterator[Rows]:
    model: Any = quantized(8, args.folder)
    random = qtk.random_precision(model, bits=(4, 8))
    found = precision_transfer(
        random, *pixels("test", args.images), normalize=NORMALIZE, budget=0.5 / 255, steps=10
    )
    print(found.table(), flush=True)
    yield _told(f"ViT, {args.images} images, .5/255, PGD-10", found)


def trained(args: argparse.Namespace) -> Iterator[Rows]:
    train, test = pixels("train", args.trained), pixels("test", args.images)
    for text in args.bits:
        bits = tuple(int(b) for b in text.split(","))
        found = random_precision.attacked(train, test, bits, epochs=args.epochs, width=args.width)
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


def _bytes(random: RandomPrecision) -> int:
    """Of every tensor that is held, each storage once."""
    layers = [m for m in random.modules() if isinstance(m, QuantLinear)]
    held: Iterable[Tensor] = [
        *random.parameters(), *random.tensors(), *(t for layer in layers for t in layer.tensors()),
        *(t for block in random.blocks for t in block.tensors()),
    ]  # fmt: skip
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    return sum(storages.values())


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
