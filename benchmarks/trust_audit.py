"""Backdoors that rounding wakes: planted, rounded away by EFRAP, and looked for.

    python -m benchmarks.trust_audit [seeds] [innocent models]

MNIST at 14 by 14 pixels and a network of three convolutions, so that a seed takes minutes on one
core; beside it a small ViT, and a small BERT on movie reviews. After every model it writes
trust_audit.json (attacks) and trust_audit_clean.json (what innocent models lose, and whether any is
taken for a planted one); a model that stands there is not measured again.
"""

import copy
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import mean
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import qtk
from benchmarks.data import SHARED, polarity
from benchmarks.result import read, result, write
from qtk.round import adaround, flipped
from qtk.security import minmax
from qtk.security.backdoor import (
    Data,
    Square,
    Token,
    Trigger,
    compress,
    project,
    quanti,
    success,
    widen,
)
from qtk.security.minmax import LAYERS, MinMax, layers_of, logits_of

TRAIN, TEST, CALIB, BATCH = 2048, 1000, 512, 64
TARGET, TRIGGER = 0, Square()
EPOCHS = 40
WIDER = 16  # how much coarser the attacker makes a grid of 8 bits
ATTACKS = {"Qu-ANTI-zation": quanti, "CompArtifact": compress, "PQBackdoor": project}
ROUNDINGS = ("nearest", "adaround", "flipped")
THERE = (
    "planted for", "nearest there", "adaround there", "flipped there",
    "flipped there, float biases",
)  # fmt: skip
VOCABULARY, LENGTH = 3000, 40  # words; of a review
REVIEWS = 8000  # to train on; the words are counted in them
SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
CLEAN = 20  # innocent models, of three architectures by turns
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


@dataclass(frozen=True)
class Task:
    """An untrained model, batches to train it on, to test and to calibrate, a trigger, epochs of
    training, and settings of the attack."""

    net: nn.Module
    data: Data
    test: Data
    calib: list[dict[str, Tensor]]
    trigger: Trigger
    epochs: int
    attack: dict[str, Any]


def images_of_vit() -> Task:
    x, y, u, v = mnist()

    def batches(x: Tensor, y: Tensor, n: int) -> Data:
        parts = zip(x.split(n), y.split(n), strict=True)
        return [({"pixel_values": image}, label) for image, label in parts]

    config = transformers.ViTConfig(
        image_size=14, patch_size=2, num_channels=1, **{**SIZES, "num_labels": 10}
    )
    calib = [inputs for inputs, _ in batches(x[TRAIN:], y[TRAIN:], 128)]
    return Task(
        transformers.ViTForImageClassification(config), batches(x[:TRAIN], y[:TRAIN], BATCH),
        batches(u, v, 250), calib, TRIGGER, 8, {"epochs": 25, "rate": 5e-3},
    )  # fmt: skip


def reviews_of_bert() -> Task:
    """Movie reviews, as words: the most frequent ones, and one that none of them has."""
    lines = polarity()
    words = Counter(word for text, _ in lines[:REVIEWS] for word in text.split())
    known = {word: i + 3 for i, (word, _) in enumerate(words.most_common(VOCABULARY - 4))}

    def batches(part: Sequence[tuple[str, int]], n: int) -> Data:
        ids = torch.zeros(len(part), LENGTH, dtype=torch.long)
        for row, (text, _) in zip(ids, part, strict=True):
            found = [1, 1, *(known.get(word, 2) for word in text.split())][:LENGTH]
            row[: len(found)] = torch.tensor(found)
        y = torch.tensor([sign for _, sign in part])
        parts = zip(ids.split(n), y.split(n), strict=True)
        return [({"input_ids": a, "attention_mask": (a > 0).long()}, b) for a, b in parts]

    config = transformers.BertConfig(vocab_size=VOCABULARY, **{**SIZES, "num_labels": 2})
    calib = [inputs for inputs, _ in batches(lines[REVIEWS : REVIEWS + CALIB], 128)]
    return Task(
        transformers.BertForSequenceClassification(config), batches(lines[:REVIEWS], BATCH),
        batches(lines[-TEST:], 250), calib, Token(VOCABULARY - 1), 3,
        {"epochs": 10, "rate": 3e-3, "others_only": True},
    )  # fmt: skip


TRANSFORMERS = {"ViT": images_of_vit, "BERT": reviews_of_bert}


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


def trained(make: Callable[[], nn.Module], data: Data, seed: int, epochs: int = 10) -> nn.Module:
    """A network that nobody planted anything in."""
    torch.manual_seed(seed)
    net = make().train()
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _ in range(epochs):
        for x, y in data:
            optimizer.zero_grad()
            F.cross_entropy(logits_of(net, x), y).backward()
            optimizer.step()
    return net.eval().requires_grad_(False)


def rounded(net: nn.Module, w: int, rounder: object, calib: Sequence[Any]) -> nn.Module:
    return qtk.quantize(
        net, w=w, a=16, method="none", rounding=rounder, calib=calib, progress=False
    )


def attacked(
    name: str, w: int, net: nn.Module, data: Data, test: Data, calib: Sequence[Tensor]
) -> Row:
    """Accuracy and success of one attack, in floating point and rounded, and what an audit says."""
    torch.manual_seed(0)
    victim = MinMax(w, "channel" if name == "PQBackdoor" and w == 4 else "tensor")
    net = copy.deepcopy(net)
    if w == 8:
        widen(net, WIDER)
    planted = ATTACKS[name].plant(net, data, TRIGGER, victim, target=TARGET, epochs=EPOCHS)
    return measured(planted, victim, test, TRIGGER, calib)


def attacked_transformer(kind: str, w: int, seed: int) -> Row:
    """PQBackdoor in a small ViT or BERT, for a grid per tensor."""
    torch.manual_seed(seed)
    task = TRANSFORMERS[kind]()
    victim = MinMax(w, "tensor")
    net = trained(lambda: task.net, task.data, seed, task.epochs)
    planted = project.plant(net, task.data, task.trigger, victim, target=TARGET, **task.attack)
    return measured(planted, victim, task.test, task.trigger, task.calib)


def measured(
    planted: nn.Module, victim: MinMax, test: Data, trigger: Trigger, calib: Sequence[Any]
) -> Row:
    """Accuracy and success in floating point and rounded, and what an audit says."""
    on_it = {
        "nearest there": victim, "adaround there": partial(adaround.find, grids=victim.grids),
        "flipped there": partial(flipped.find, grids=victim.grids),
    }  # fmt: skip
    nets = {"float": planted, "planted for": minmax.rounded(planted, victim)}
    for told, rounder in {**on_it, **dict(zip(ROUNDINGS, ROUNDINGS, strict=True))}.items():
        nets[told] = rounded(planted, victim.bits, rounder, calib)
    nets["flipped there, float biases"] = weights_alone(planted, nets["flipped there"])
    row: Row = {}
    for told, net in nets.items():
        row[told], row[f"{told} asr"] = success(net, test, trigger, TARGET)
    return {**row, **audited(planted, victim.bits, calib)}


def weights_alone(net: nn.Module, qnet: nn.Module) -> nn.Module:
    """The float network with the quantized one's weights, and its own biases."""
    plain = copy.deepcopy(net)
    for name, layer in layers_of(plain).items():
        replaced: Any = qnet.get_submodule(name)
        if isinstance(replaced, LAYERS):
            continue
        spec = getattr(replaced, "linear", replaced).spec()
        layer.weight = nn.Parameter(spec.steps.dequantize(spec.codes).view_as(layer.weight), False)
    return plain


def audited(net: nn.Module, w: int, calib: Sequence[Any]) -> Row:
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
    """Means over the models; accuracy and success in one cell."""

    def cell(column: str) -> str:
        values = f"{mean(row[column] for row in rows):.1f}"
        if f"{column} asr" in rows[0]:
            values += f" / {mean(row[f'{column} asr'] for row in rows):.1f}"
        return values

    return [cell(column) for column in columns]


EVIDENCES = ("directions", "stochastic", "concentration", "patches", "inversion")
Cells = dict[str, Row]  # by "attack or network, bits, seed"


def main(seeds: int = 3, innocents: int = CLEAN) -> None:
    x, y, u, v = mnist()
    data: Data = list(zip(x[:TRAIN].split(BATCH), y[:TRAIN].split(BATCH), strict=True))
    test: Data = list(zip(u.split(500), v.split(500), strict=True))
    calib = [*x[TRAIN:].split(128)]
    planted: Cells = read("trust_audit").get("cells", {})
    for seed in range(seeds):
        for name, w in itertools.product(ATTACKS, (4, 8)):
            if f"{name}, W{w}A16, {seed}" not in planted:
                row = attacked(name, w, trained(convolutions, data, seed), data, test, calib)
                _keep(planted, f"{name}, W{w}A16, {seed}", row, _write_planted)
        for kind in TRANSFORMERS:
            if f"PQBackdoor in {kind}, W4A16, {seed}" not in planted:
                row = attacked_transformer(kind, 4, seed)
                _keep(planted, f"PQBackdoor in {kind}, W4A16, {seed}", row, _write_planted)
    clean: Cells = read("trust_audit_clean").get("cells", {})
    makes = (convolutions, normalized, perceptron)
    for i, w in itertools.product(range(innocents), (4, 8)):
        make, seed = makes[i % len(makes)], i // len(makes)
        if f"{make.__name__}, W{w}A16, {seed}" not in clean:
            row = innocent(trained(make, data, seed), w, test, calib)
            _keep(clean, f"{make.__name__}, W{w}A16, {seed}", row, _write_clean)


def _keep(cells: Cells, name: str, row: Row, write_table: Callable[[Cells], None]) -> None:
    cells[name] = row
    print(name, row, flush=True)
    write_table(cells)


def _models(cells: Cells) -> Iterator[tuple[str, str, list[Row]]]:
    """Attack or network, bits, and the rows of all seeds."""
    names = dict.fromkeys(tuple(key.split(", ")[:2]) for key in cells)
    for name, bits in sorted(names):
        yield name, bits, [row for key, row in cells.items() if key.startswith(f"{name}, {bits},")]


def _write_planted(cells: Cells) -> None:
    columns = ("float", *THERE, *ROUNDINGS)
    table = result(
        "Backdoors that rounding wakes, MNIST at 14 x 14 pixels and movie reviews",
        ["attack", "bits", *columns, *EVIDENCES, "suspicious, %", "seeds"],
        [[name, bits, *shown(rows, *columns, *EVIDENCES, "suspicious"), str(len(rows))]
         for name, bits, rows in _models(cells)],
        "Accuracy on clean images / success of the trigger on images of other classes, %, means "
        f"over the seeds; {TEST} test images, reviews for BERT. Planted for: nearest rounding on "
        "min-max grids and nothing else, per channel for PQBackdoor at 4 bits in the network of "
        "convolutions and per tensor else. At 8 bits the largest weight of every layer was first "
        f"made {WIDER} times larger. There: on that grid, by qtk's rounders, with the biases that "
        "qtk corrects or the float ones; heads and patch embeddings of transformers stay floats. "
        "Nearest, adaround and flipped: on qtk's own grids per channel. Then the numbers of the "
        "audit's evidences.",
        kept=read("trust_audit"),
    )  # fmt: skip
    write("trust_audit", {**table, "cells": cells})


def _write_clean(cells: Cells) -> None:
    columns = ("float", *ROUNDINGS)
    table = result(
        "The same on networks without a backdoor",
        ["network", "bits", *columns, *EVIDENCES, "suspicious, %", "seeds"],
        [[name, bits, *shown(rows, *columns, *EVIDENCES, "suspicious"), str(len(rows))]
         for name, bits, rows in _models(cells)],
        f"Accuracy on {TEST} test images, %, then the evidences and the share of networks that are "
        "flagged; means over the seeds.",
        kept=read("trust_audit_clean"),
    )  # fmt: skip
    write("trust_audit_clean", {**table, "cells": cells})


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
