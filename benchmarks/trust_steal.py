"""What a thief gets of a ViT that reads digits, float and quantized; whether InI survives rounding.

python -m benchmarks.trust_steal --resume FOLDER

Figures go to benchmarks/results/trust_steal.json after every seed. FOLDER keeps finished clones.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qtk
from benchmarks.data import SHARED, cifar10
from benchmarks.result import result, write
from qtk.security import clone as clones
from qtk.security.cloning import OFFSET, Victim
from qtk.security.defence.isolate import Epoch, harden

SEEDS = (0, 1, 2)
WIDTHS = {"W8A8": (8, 8), "W6A6": (6, 6), "W4A8": (4, 8), "W4A4": (4, 4)}
COLUMNS = ["figure", "float", *WIDTHS]
TRAIN, POOL, TEST = 8_000, 2_000, 2_000
EPOCHS = 10  # of a clone
NOTES = (
    "%; mean of the seeds of victim, queries and clone, smallest and largest in brackets. Victim: "
    "ViT of 3 layers, width 64, taught with 8,000 MNIST images; thief: small CNN, 2,000 queries, "
    "10 epochs, the last one counts. in: other MNIST images; natural: grey CIFAR-10, other images "
    "than InI was trained with; noise: 1/f, without data. InI: gamma .3, delta 1, PCGrad, "
    "epsilon 1000 sqrt(n / 11.2e6), the student another CNN of the same kind, 4 epochs from the "
    "plain model. Preset fast, 256 calibration images"
)
Found = dict[str, dict[str, list[float]]]  # figure -> column -> a value a seed


def digits() -> dict[str, tuple[Tensor, Tensor]]:
    """MNIST as [N, 1, 28, 28] in [-1, 1] and labels: to train on, for thieves, to test on."""
    held = np.load(SHARED / "data" / "mnist" / "mnist.npz")
    found = {}
    for name, part, start, n in (
        ("train", "train", 0, TRAIN), ("in", "train", 20_000, POOL), ("test", "test", 0, TEST)
    ):  # fmt: skip
        images = torch.from_numpy(held[f"x_{part}"][start : start + n].copy()).float() / 127.5 - 1
        labels = torch.from_numpy(held[f"y_{part}"][start : start + n].astype(np.int64))
        found[name] = images[:, None], labels
    return found


def photographs() -> tuple[Tensor, Tensor]:
    """Grey CIFAR-10 of 28 pixels in [-1, 1]: for InI, and others for thieves."""
    images = cifar10("train", 2 * POOL)[0].mean(1, keepdim=True)
    low, high = images.amin(), images.amax()
    small = F.interpolate((images - low) / (high - low) * 2 - 1, 28, mode="area")
    return small[:POOL], small[POOL:]


def vit(seed: int) -> nn.Module:
    """Untrained."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "image_size": 28, "patch_size": 7, "num_channels": 1, "num_labels": 10, "hidden_size": 64,
        "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128,
    }  # fmt: skip
    return ViTForImageClassification(ViTConfig(**sizes))


def trained(images: Tensor, labels: Tensor, seed: int, epochs: int = 8) -> nn.Module:
    model = vit(seed)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-3, total_steps=epochs * -(-len(images) // 128)
    )
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(128):
            optimizer.zero_grad()
            F.cross_entropy(model(images[chosen]).logits, labels[chosen]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def note(found: Found, figure: str, column: str, value: float) -> None:
    found.setdefault(figure, {}).setdefault(column, []).append(value)


def once(found: Found, figure: str, column: str, place: int, share: float) -> None:
    """Notes a share that is measured again with every width, the float model's, one time a seed."""
    if len(found.get(figure, {}).get(column, [])) <= place:
        note(found, figure, column, 100 * share)


def keep(found: Found) -> None:
    rows = [
        [figure, *(_cell(columns.get(name, [])) for name in COLUMNS[1:])]
        for figure, columns in found.items()
    ]
    write("trust_steal", result("Stealing after rounding", COLUMNS, rows, NOTES))
    for row in rows:
        print(*row, sep=" | ", flush=True)


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean = statistics.mean(values)
    spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
    return f"{mean:.1f}{spread}"


def oracle(
    found: Found, pool: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], seed: int
) -> None:
    """A clone taught with true labels: no thief does better with these images."""
    truth = F.one_hot(pool[1], 10).float()
    clone = clones.teach(clones.cnn(1, 10), pool[0], truth, EPOCHS, OFFSET + seed)
    right = (Victim(clone).classes(test[0]) == test[1]).double().mean()
    note(found, "clone taught with true labels of the pool in", "float", 100 * float(right))


def rob(
    found: Found, title: str, model: nn.Module, data: dict[str, tuple[Tensor, Tensor]],
    natural: Tensor, place: int, seed: int, resume: Path | None,
) -> None:  # fmt: skip
    """All thieves on one victim in every width."""
    start = torch.randperm(TRAIN, generator=torch.Generator().manual_seed(seed))[:256]
    calib = [data["train"][0][start]]
    pool = {"in": data["in"][0], "in, 300": data["in"][0][:300], "natural": natural}
    for width, (w, a) in WIDTHS.items():
        qmodel = qtk.quantize(model, w=w, a=a, calib=calib, preset="fast", progress=False)
        plans = [(["knockoff"], ["soft", "hard"], pool), (["noise"], ["soft"], pool)]
        if width in ("W8A8", "W4A4"):
            plans.append((["jacobian"], ["soft"], {"in": pool["in"], "natural": natural}))
        for thief, answers, asked in plans:
            seen = qtk.steal(
                model, qmodel, asked, data["test"], thief=thief, answers=answers, budget=POOL,
                epochs=EPOCHS, seeds=(seed,), train=data["train"][0], resume=resume,
                progress=False,
            )  # fmt: skip
            for row in seen.rows:
                column = "float" if row.victim == "float" else width
                kind = f"{title}: {row.thief}, {row.pool}, {row.answers}"
                once(found, f"{title}: accuracy of the victim", column, place, row.victim_accuracy)
                once(found, kind, column, place, row.clone_accuracy)
                if row.pool == "natural" and row.thief == "knockoff":
                    head = f"{kind}, agrees with the float model"
                    once(found, head, column, place, row.agreement_float)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    parser.add_argument("--resume", type=Path)
    options = parser.parse_args()
    data, (outside, natural), found = digits(), photographs(), Found()
    for place, seed in enumerate(options.seeds):
        plain = trained(*data["train"], seed)
        log: list[Epoch] = []
        # S differs from the thieves' clones in its seed
        hard = harden(plain, data["train"], outside, seed=seed, epochs=4, log=log, progress=False)
        print(*log, sep="\n", flush=True)
        note(
            found,
            "InI: isolation in the last epoch, cosine x 100",
            "float",
            100 * log[-1].isolation,
        )
        fall = log[0].induction / log[-1].induction
        note(found, "InI: induction, first epoch over last", "float", fall)
        oracle(found, data["in"], data["test"], seed)
        for title, model in (("plain", plain), ("InI", hard)):
            rob(found, title, model, data, natural, place, seed, options.resume)
        keep(found)


if __name__ == "__main__":
    main()
