"""How robust the small ViT and a text classifier are in 8, 6 and 4 bits, beside floating point.

    python -m benchmarks.trust_robust images | floor | large | text ... [--images N] [--bits B ...]
                                      [--attacks NAME ...] [--sentences N] [--folder FOLDER]

writes benchmarks/results/trust_robust.json, whose other figures stay. What is found on the way is
kept in --folder, from which an interrupted run goes on.

images   every attack at .5 and 2 /255 and their l2 and l1 peers, worst case of each image; what
         APGD has wrong is spared the others
floor    what two calibration seeds differ by, under FGSM, PGD and APGD at .5/255
large    PGD at 8/255
text     MR polarity with a MiniLM: typing errors, lost and swapped words, embedding PGD
"""

import argparse
import time
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

import qtk
from benchmarks import data
from benchmarks.result import read, result, versions_of, write
from qtk.robust import Robustness, Row

NORMALIZE = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)  # of the model's own processor
CALIBRATION = 128
COLUMNS = ["row", "float", "W8A8", "W6A6", "W4A4"]
FIGURES = {8: 2, 6: 3, 4: 4}  # columns by bits
SHOWN = ("clean", "noise", "attack", "worst")
NOTES = (
    "share that is right, % (quantized: difference to float in the same run, its 95 % interval, "
    "McNemar's p); images: rows of other attacks are of APGD on the cross entropy and of them; "
    "CIFAR-10 test images as integers where nothing else is said, attacks of 10 steps, Square of "
    "100 queries, all from one seed; calibrated on 128 training images; seconds of CPU, one thread "
    "of a machine that had other work"
)


def pixels(split: str, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images in [0, 1] and their labels, in an order that is drawn: the archive's is by class."""
    normalized, labels = data.cifar10(split, n, seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in NORMALIZE)
    return (((normalized * std + mean) * 255).round().clamp(0, 255) / 255)[order], labels[order]


def quantized(bits: int, folder: Path, seed: int = 0) -> nn.Module:
    """The small ViT, kept once it is made."""
    kept = folder / f"w{bits}a{bits}-{seed}"
    if not (kept / "config.json").exists():
        calib, _ = data.cifar10("train", CALIBRATION, seed)
        batches = [{"pixel_values": part} for part in calib.split(32)]
        made: Any = qtk.quantize(data.vit(), w=bits, a=bits, calib=batches, seed=seed)
        made.save_pretrained(kept)
    return qtk.load(kept)


def images(args: argparse.Namespace, bits: int) -> Robustness:
    return study(args, bits, suite=args.attacks, budgets=("small", "mid"), thorough=False)


def large(args: argparse.Namespace, bits: int) -> Robustness:
    return study(args, bits, suite=["noise", "pgd_linf"], budgets=("large",))


def floor(args: argparse.Namespace, bits: int) -> Robustness:
    return study(
        args, bits, suite=["fgsm", "pgd_linf", "apgd_ce"], budgets=("small",),
        second=quantized(bits, args.folder, seed=1),
    )  # fmt: skip


def study(args: argparse.Namespace, bits: int, **options: Any) -> Robustness:
    found = qtk.robustness(
        data.vit(), quantized(bits, args.folder), pixels("test", args.images), normalize=NORMALIZE,
        resume=args.folder / "cells", progress=False, **options,
    )  # fmt: skip
    print(found.table(), flush=True)
    return found


def reviews(n: int) -> list[tuple[str, int]]:
    """The first sentences of the MR set, positive and negative by turns."""
    archive = data.SHARED / "data" / "mr-sentence-polarity" / "sentence_polarity.zip"
    with zipfile.ZipFile(archive) as files:
        texts = [
            files.read(f"sentence_polarity/rt-polarity.{word}").decode("latin-1").splitlines()[:n]
            for word in ("neg", "pos")
        ]
    found = [(text.strip(), label) for label in (0, 1) for text in texts[label]]
    Random(0).shuffle(found)
    return found


def classifier(train: list[tuple[str, int]]) -> tuple[Any, Any]:
    """MiniLM with a head on its first token, learned by logistic regression on frozen features."""
    from transformers import AutoTokenizer, BertForSequenceClassification

    path = data.minilm_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = BertForSequenceClassification.from_pretrained(path, num_labels=2).eval()
    features, labels = [], torch.tensor([label for _, label in train])
    with torch.no_grad():
        for start in range(0, len(train), 64):
            texts = [text for text, _ in train[start : start + 64]]
            batch = tokenizer(texts, padding=True, truncation=True, max_length=64,
                              return_tensors="pt")  # fmt: skip
            features.append(model.bert(**batch).pooler_output)
    x, head = torch.cat(features), model.classifier
    lbfgs = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        lbfgs.zero_grad()
        value = nn.functional.cross_entropy(head(x), labels) + 1e-3 * head.weight.square().sum()
        value.backward()
        return value

    lbfgs.step(loss)  # type: ignore[arg-type]
    return model, tokenizer


def text(args: argparse.Namespace, bits: int) -> Robustness:
    """Learned on 1,000 sentences, calibrated on 128 of them, tried on others."""
    pairs = reviews(1000)
    model, tokenizer = classifier(pairs[:1000])
    qmodel = qtk.quantize(
        model, w=bits, a=bits, calib=[t for t, _ in pairs[:CALIBRATION]], tokenizer=tokenizer
    )
    found = qtk.robustness(
        model, qmodel, pairs[1000 : 1000 + args.sentences], "text", tokenizer,
        budgets=("small", "mid"), resume=args.folder / "cells", progress=False,
    )  # fmt: skip
    print(found.table(), flush=True)
    return found


PARTS = {"images": images, "floor": floor, "large": large, "text": text}


def shown(
    what: str, found: Robustness, bits: int, rows: list[list[str]], seconds: float
) -> list[list[str]]:
    """The rows with one more column filled."""
    cells = {row[0]: row for row in rows}
    kept = [row for row in found.rows if row.kind in SHOWN]
    for row in kept:
        name = f"{what}, {found.samples}: {row.title}"
        line = cells.setdefault(name, [name, *["-"] * (len(COLUMNS) - 1)])
        line[1] = f"{100 * row.accuracy_float:.1f}"
        line[FIGURES[bits]] = _figure(row)
    facts = {"seconds": f"{seconds:.0f}", "checks that failed": _failed(found)}
    if found.floor:
        facts["floor"] = ", ".join(f"{k} {100 * v:.1f}" for k, v in found.floor.items())
    for fact, value in facts.items():
        name = f"{what}, {found.samples}: {fact}"
        cells.setdefault(name, [name, *["-"] * (len(COLUMNS) - 1)])[FIGURES[bits]] = value
    return list(cells.values())


def _figure(row: Row) -> str:
    interval = f"{100 * row.low:+.1f} to {100 * row.high:+.1f}"
    told = f"{100 * row.accuracy_quantized:.1f} ({100 * row.difference:+.1f}: {interval}, "
    told += f"p {row.p:.2f}"
    return told + (", below the floor)" if row.says_nothing else ")")


def _failed(found: Robustness) -> str:
    if not found.checks:
        return "no checks"
    return ", ".join(f"{c.model} {c.name}" for c in found.checks if c.passed is False) or "none"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("parts", nargs="*", default=list(PARTS))
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--sentences", type=int, default=500)
    parser.add_argument("--attacks", nargs="+", default=["attacks"])
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 6, 4])
    parser.add_argument("--folder", type=Path, default=Path("trust-out"))
    args = parser.parse_args()
    for part in args.parts:
        for bits in args.bits:
            started = time.process_time()
            found = PARTS[part](args, bits)
            seconds = time.process_time() - started
            kept = read("trust_robust")
            rows = shown(part, found, bits, kept.get("rows", []), seconds)
            versions = versions_of("qtk", "torch", "transformers", "foolbox")
            write("trust_robust", result("Robustness in fewer bits", COLUMNS, rows, NOTES,
                                         versions=versions, kept=kept))  # fmt: skip


if __name__ == "__main__":
    main()
