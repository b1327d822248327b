"""Backdoors that rounding wakes: planted, rounded away by EFRAP, and looked for.

    python -m benchmarks.trust_audit [seeds]

MNIST at 14 by 14 pixels and a network of three convolutions, so that a seed takes minutes on one
core. After every row it writes trust_audit.json (attacks) and trust_audit_clean.json (what innocent
models lose, and whether any is taken for a planted one).
"""

import copy
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qtk
from benchmarks.data import SHARED
from benchmarks.result import result, write
from qtk.security import minmax
from qtk.security.backdoor import (
    Data,
    Square,
    compress,
    project,
    quanti,
    success,
    widen,
)
from qtk.security.minmax import MinMax, layers_of

TRAIN, TEST, CALIB, BATCH = 2048, 2000, 512, 64
TARGET, TRIGGER = 0, Square()
EPOCHS = 15
WIDER = 16  # how much coarser the attacker makes a grid of 8 bits
ATTACKS = {"Qu-ANTI-zation": quanti, "CompArtifact": compress, "PQBackdoor": project}
ROUNDINGS = ("nearest", "gptq", "adaround", "flipped")
Row = dict[str, float]


def mnist() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images [n, 1, 14, 14] from 0 to 1 and their classes, to train on and to test on."""
    with np.load(SHARED / "data" / "mnist" / "mnist.npz") as held:
        arrays = [held[name] for name in ("x_train", "y_train", "x_test", "y_test")]
    x, y, u, v = (torch.from_numpy(array) for array in arrays)
    return (
        F.avg_pool2d(x[: TRAIN + CALIB, None].float() / 255, 2), y[: TRAIN + CALIB].long(),
        F.avg_pool2d(u[:TEST, None].float() / 255, 2), v[:TEST].long(),
    )  # fmt: skip


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),
        nn.Conv2d(32, 32, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip


def normalized() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(),
        nn.Linear(512, 10),
    )  # fmt: skip


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(196, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(),
        nn.Linear(64, 10),
    )  # fmt: skip


def trained(make: Callable[[], nn.Module], data: Data, seed: int, epochs: int = 4) -> nn.Module:
    """A network that nobody planted anything in."""
    torch.manual_seed(seed)
    net = make().train()
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _ in range(epochs):
        for x, y in data:
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    return net.eval().requires_grad_(False)


def rounded(net: nn.Module, w: int, rounder: object, calib: Sequence[Tensor]) -> nn.Module:
    return qtk.quantize(
        net, w=w, a=16, method="none", rounding=rounder, calib=calib, progress=False
    )


def attacked(name: str, w: int, net: nn.Module, data: Data, test: Data,
             calib: Sequence[Tensor]) -> Row:  # fmt: skip
    """Accuracy and success of one attack, in floating point and rounded, and what an audit says."""
    torch.manual_seed(0)
    victim = MinMax(w, "tensor" if name == "CompArtifact" or w == 8 else "channel")
    net = copy.deepcopy(net)
    if w == 8:
        widen(net, WIDER)
    planted = ATTACKS[name].plant(net, data, TRIGGER, victim, target=TARGET, epochs=EPOCHS)
    row: Row = {}
    row["float"], row["float asr"] = success(planted, test, TRIGGER, TARGET)
    nearest = minmax.rounded(planted, victim)
    row["planted for"], row["planted for asr"] = success(nearest, test, TRIGGER, TARGET)
    for rounder in ROUNDINGS:
        qnet = rounded(planted, w, rounder, calib)
        row[rounder], row[f"{rounder} asr"] = success(qnet, test, TRIGGER, TARGET)
        told, plain = f"{rounder}, float biases", weights_alone(planted, qnet)
        row[told], row[f"{told} asr"] = success(plain, test, TRIGGER, TARGET)
    return {**row, **audited(planted, w, calib)}


def weights_alone(net: nn.Module, qnet: nn.Module) -> nn.Module:
    """The float network with the quantized one's weights, and its own biases."""
    plain = copy.deepcopy(net)
    for name, layer in layers_of(plain).items():
        replaced: Any = qnet.get_submodule(name)
        spec = getattr(replaced, "linear", replaced).spec()
        layer.weight = nn.Parameter(spec.steps.dequantize(spec.codes).view_as(layer.weight), False)
    return plain


def audited(net: nn.Module, w: int, calib: Sequence[Tensor]) -> Row:
    found = qtk.audit(net, calib, w=w)
    row = {evidence.name: evidence.number for evidence in found.evidences}
    return {**row, "suspicious": 100.0 * found.suspicious}


def innocent(net: nn.Module, w: int, test: Data, calib: Sequence[Tensor]) -> Row:
    """Accuracy of a clean network, rounded, and what an audit says."""
    row = {"float": success(net, test, TRIGGER, TARGET)[0]}
    for rounder in ROUNDINGS:
        row[rounder] = success(rounded(net, w, rounder, calib), test, TRIGGER, TARGET)[0]
    return {**row, **audited(net, w, calib)}


def shown(rows: Sequence[Row], *columns: str) -> list[str]:
    """Means over the seeds; accuracy and success in one cell."""

    def cell(column: str) -> str:
        values = f"{mean(row[column] for row in rows):.1f}"
        if f"{column} asr" in rows[0]:
            values += f" / {mean(row[f'{column} asr'] for row in rows):.1f}"
        return values

    return [cell(column) for column in columns]


EVIDENCES = ("directions", "stochastic", "concentration", "inversion")


def main(seeds: int = 1) -> None:
    started = time.perf_counter()
    x, y, u, v = mnist()
    data: Data = list(zip(x[:TRAIN].split(BATCH), y[:TRAIN].split(BATCH), strict=True))
    test: Data = list(zip(u.split(500), v.split(500), strict=True))
    calib = [*x[TRAIN:].split(128)]
    planted: dict[tuple[str, int], list[Row]] = {}
    clean: dict[tuple[str, int], list[Row]] = {}
    for seed in range(seeds):
        victim = trained(convolutions, data, seed)
        for name, w in itertools.product(("PQBackdoor", *ATTACKS), (4, 8)):
            if len(planted.get((name, w), ())) <= seed:
                row = attacked(name, w, victim, data, test, calib)
                planted.setdefault((name, w), []).append(row)
                print(seed, name, w, row, flush=True)
                _write(planted, clean, seed + 1, time.perf_counter() - started)
        for make, w in itertools.product((convolutions, normalized, perceptron), (4, 8)):
            row = innocent(trained(make, data, seed), w, test, calib)
            clean.setdefault((make.__name__, w), []).append(row)
            print(seed, make.__name__, w, row, flush=True)
            _write(planted, clean, seed + 1, time.perf_counter() - started)


def _write(
    planted: dict[tuple[str, int], list[Row]], clean: dict[tuple[str, int], list[Row]],
    seeds: int, seconds: float,
) -> None:  # fmt: skip
    said = f"{seeds} seed{'s' if seeds > 1 else ''}, means. {seconds / 60:.0f} minutes in all."
    columns = (
        "float", "planted for", *ROUNDINGS, *(f"{name}, float biases" for name in ROUNDINGS),
    )  # fmt: skip
    write("trust_audit", result(
        "Backdoors that rounding wakes, MNIST at 14 x 14 pixels",
        ["attack", "bits", *columns, *EVIDENCES, "suspicious, %"],
        [[name, f"W{w}A16", *shown(rows, *columns, *EVIDENCES, "suspicious")]
         for (name, w), rows in planted.items()],
        "Accuracy on clean images / success of the trigger on images of other classes, %. Planted "
        "for: nearest rounding on min-max grids and nothing else, per tensor for CompArtifact and "
        f"at 8 bits, where the largest weight of every layer was first made {WIDER} times larger, "
        "and per channel else. The others are qtk's rounders on their own grids per channel, with "
        "the biases that qtk corrects and with the float ones. Then the numbers of the "
        f"audit's evidences. {said}",
    ))  # fmt: skip
    if not clean:
        return
    columns = ("float", *ROUNDINGS)
    write("trust_audit_clean", result(
        "The same on networks without a backdoor",
        ["network", "bits", *columns, *EVIDENCES, "suspicious, %"],
        [[name, f"W{w}A16", *shown(rows, *columns, *EVIDENCES, "suspicious")]
         for (name, w), rows in clean.items()],
        f"Accuracy, %, then the evidences and the share of networks that are flagged. {said}",
    ))  # fmt: skip


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
