"""What rounding does to fairness: a synthetic census, Adult, German credit, film reviews.

python -m benchmarks.trust_fairness census retrain adult credit text

Figures go to benchmarks/results/trust_fairness.json as they are measured; rows of parts that were
not asked for stay.
"""

import argparse
import csv
import math
import statistics
import zipfile
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import qtk
from benchmarks.data import SHARED, minilm, minilm_path
from benchmarks.result import read, result, write
from qtk.discover import load
from qtk.fair import census as synthetic
from qtk.fair import classifier, decoder
from qtk.fair.answer import Answer
from qtk.fair.domain import Domain
from qtk.fair.result import Instances
from qtk.fair.retrain import retrain
from qtk.fair.rows import Columns
from qtk.fair.text import SWAPS
from qtk.integrity import digest

SEEDS = (0, 1, 2)
WIDTHS = {"W8A8": (8, 8), "W6A6": (6, 6), "W4A8": (4, 8), "W4A4": (4, 4)}
COLUMNS = ["figure", "float", *WIDTHS]
CALIBRATION = 256
PROBES = ("random", "neighbours", "prior", "latent")
NOTES = (
    "mean of three seeds of model and calibration, and of the synthetic census's data, smallest "
    "and largest in brackets; %, but for ratios (disparate churn of a seed without any change in "
    "one group is left out); preset fast, 256 calibration rows; 'second seed': a model calibrated "
    "on other rows, which is the floor. instances: of 3,000 rows tried, or of all 73,728 "
    "(exhaustive), once for all values of the protected attribute. Classifier of rows: BERT of "
    "2 layers, width 64; real tables are split by a hash of the row, 3 to 1"
)
REVIEWS = (
    ". reviews: MiniLM, its head taught on 4,000 sentences; those of 3,000 others that have a word "
    "to swap"
)
Found = dict[str, dict[str, list[float]]]  # figure -> width -> a value a seed


def keep(found: Found) -> None:
    """Writes figures, the others of the file as they are."""
    kept = read("trust_fairness")
    rows = {row[0]: row for row in kept.get("rows", [])}
    for figure, widths in found.items():
        rows[figure] = [figure, *(_cell(widths.get(width, [])) for width in COLUMNS[1:])]
    notes = NOTES + REVIEWS * any(figure.startswith("reviews") for figure in rows)
    write("trust_fairness", result("Fairness after rounding", COLUMNS, list(rows.values()), notes,
                                   kept=kept))  # fmt: skip
    for figure in found:
        print(*rows[figure], sep=" | ", flush=True)


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean = statistics.mean(values)
    return (
        f"{mean:.2f} ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else f"{mean:.2f}"
    )


def note(found: Found, figure: str, width: str, value: float) -> None:
    found.setdefault(figure, {}).setdefault(width, []).append(value)


def quantized(model: nn.Module, width: str, rows: Tensor, seed: int) -> nn.Module:
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:CALIBRATION]
    w, a = WIDTHS[width]
    calib = [{"input_ids": rows[chosen]}]
    return qtk.quantize(model, w=w, a=a, calib=calib, preset="fast", progress=False)


def compare(
    found: Found, title: str, model: nn.Module, data: Sequence[Tensor], columns: Columns, name: str,
    seed: int, widths: Sequence[str], probes: Sequence[str],
) -> None:  # fmt: skip
    """Notes all figures of one model and one attribute."""
    rows, _, test, labels = data
    attribute = columns.attribute(name)
    made = decoder.fit(rows, Domain.of(rows, [attribute], columns.domain), seed)
    for number, width in enumerate(widths):
        seen = qtk.fairness(
            model, quantized(model, width, rows, seed), test, attribute, labels,
            second=quantized(model, width, rows, seed + 100), domain=columns.domain, probe=probes,
            decoder=made, seed=seed, progress=False,
        )  # fmt: skip
        for figure in seen.figures:
            size = 1 if figure.name == "DI" else 100
            if number == 0:
                note(found, f"{title}: {figure.name}", "float", size * figure.on_float)
            note(found, f"{title}: {figure.name}", width, size * figure.on_quantized)
        for churn in seen.churn:
            head = f"{title}: decisions changed, {churn.where}, {churn.group}"
            note(found, head, width, 100 * churn.changed / churn.samples)
            if churn.group == "all":
                second = 100 * (churn.second or 0) / churn.samples
                note(found, f"{head}, second seed", width, second)
        for row in seen.disparities:
            if 0 < row.ratio < math.inf:
                note(found, f"{title}: disparate churn, {row.where}", width, row.ratio)
        _instances(found, title, seen.instances, width, number == 0)


def _instances(
    found: Found, title: str, rows: Sequence[Instances], width: str, first: bool
) -> None:
    rates: dict[str, tuple[float, float]] = {}
    for row in rows:
        rates[row.probe] = row.found / row.tested, row.found_quantized / row.tested_quantized
        head = f"{title}: instances, {row.probe}"
        if first:
            note(found, head, "float", 100 * rates[row.probe][0])
        note(found, head, width, 100 * rates[row.probe][1])
        if row.probe in ("exhaustive", "random"):
            for sign, count in (("unfair", row.became_unfair), ("fair", row.became_fair)):
                note(found, f"{title}: became {sign}, {row.probe}", width, 100 * count / row.tested)
            if row.second is not None:
                both = 100 * sum(row.second) / row.tested
                note(found, f"{title}: became either, {row.probe}, second seed", width, both)
    for other in (
        sorted({"prior", "random", "exhaustive"} & rates.keys()) if "latent" in rates else ()
    ):
        head = f"{title}: rate of latent over {other}, ratio"
        if first:
            note(found, head, "float", rates["latent"][0] / rates[other][0])
        note(found, head, width, rates["latent"][1] / rates[other][1])


@cache
def of_census(seed: int) -> tuple[tuple[Tensor, ...], nn.Module]:
    data = synthetic.split(seed=seed)
    model = classifier.bert(synthetic.COLUMNS, seed)
    return data, classifier.train(model, data[0], data[1], seed=seed)


def census(seeds: Sequence[int]) -> None:
    """The synthetic census, exhaustively."""
    found: Found = {}
    sex = synthetic.COLUMNS.attribute("sex")
    all_rows = Domain(tuple(map(tuple, synthetic.COLUMNS.domain))).without(sex).all()
    pairs = synthetic.COLUMNS.decode(sex.everyone(all_rows).flatten(0, 1)).numpy()
    sides = (synthetic.probability(pairs) > 0.5).reshape(-1, 2)
    note(found, "census: instances of the formula itself, exhaustive", "float",
         100 * float(np.mean(sides[:, 0] != sides[:, 1])))  # fmt: skip
    for seed in seeds:
        data, model = of_census(seed)
        compare(found, "census", model, data, synthetic.COLUMNS, "sex", seed, list(WIDTHS), PROBES)
        keep(found)


def retraining(seeds: Sequence[int]) -> None:
    """Taught again with the instances that the latent probe found, then quantized."""
    found: Found = {}
    columns = synthetic.COLUMNS
    sex = columns.attribute("sex")
    for seed in seeds:
        data, model = of_census(seed)
        rows, labels = data[:2]
        space = Domain.of(rows, [sex], columns.domain)
        made = decoder.fit(rows, space, seed)
        generator = torch.Generator().manual_seed(seed)
        tried = load("fair.probe", "latent").draw(
            Answer(model), rows, space, sex, 3000, generator, decoder=made
        )
        taught = retrain(
            model, rows, labels, tried[Answer(model).unfair(tried, sex)], sex, seed=seed
        )
        compare(found, "census, retrained", taught, data, columns, "sex", seed, ["W8A8", "W4A4"],
                ())  # fmt: skip
        keep(found)


def table_of(name: str) -> tuple[Any, Tensor, Tensor]:
    """Features [N, F], labels [N] and whether a row is for training, by a hash of it."""
    with (SHARED / "data" / "census" / f"{name}.csv").open(encoding="utf-8") as file:
        held = [list(map(int, row)) for row in list(csv.reader(file))[1:]]
    train = np.array([int(digest(row)[:8], 16) % 4 > 0 for row in held])
    values = np.array(held)
    return values[:, :-1], torch.from_numpy(values[:, -1].copy()), torch.from_numpy(train)


def real(name: str, title: str, names: Sequence[str], numeric: Sequence[str], attribute: str,
         epochs: int) -> Callable[[Sequence[int]], None]:  # fmt: skip
    """A part that measures a table of real people."""

    def part(seeds: Sequence[int]) -> None:
        found: Found = {}
        table, labels, train = table_of(name)
        columns = columns_of(table, table[train.numpy()], names, numeric)
        rows = columns.encode(table)
        data = rows[train], labels[train], rows[~train], labels[~train]
        for seed in seeds:
            model = classifier.train(
                classifier.bert(columns, seed), *data[:2], epochs=epochs, seed=seed
            )
            compare(found, title, model, data, columns, attribute, seed, ["W8A8", "W4A4"],
                    PROBES)  # fmt: skip
            keep(found)

    return part


def columns_of(table: Any, train: Any, names: Sequence[str], numeric: Sequence[str]) -> Columns:
    """Bins of the training rows; codes as they are known beforehand, occurring there or not."""
    own, whole = Columns.of(train, names, numeric), Columns.of(table, names, numeric)
    sizes = [(own if name in numeric else whole).sizes[place] for place, name in enumerate(names)]
    return Columns(own.names, tuple(sizes), own.edges)


ADULT = ("age", "workclass", "fnlwgt", "education", "marital", "occupation", "relationship", "race",
         "sex", "gain", "loss", "hours", "country")  # fmt: skip
CREDIT = tuple(f"column {i}" if i not in (8, 12) else ("sex", "age")[i == 12] for i in range(20))


def reviews() -> tuple[list[str], Tensor]:
    """All sentences of MR, shuffled, and whether they praise."""
    archive = SHARED / "data" / "mr-sentence-polarity" / "sentence_polarity.zip"
    with zipfile.ZipFile(archive) as files:
        told = [
            (line, sign)
            for sign, word in ((1, "pos"), (0, "neg"))
            for line in _lines(files.read(f"sentence_polarity/rt-polarity.{word}"))
        ]
    order = torch.randperm(len(told), generator=torch.Generator().manual_seed(0)).tolist()
    return [told[i][0] for i in order], torch.tensor([told[i][1] for i in order])


def _lines(held: bytes) -> list[str]:
    return held.decode("latin-1").splitlines()


def review_classifier(sentences: Sequence[str], labels: Tensor, seed: int) -> tuple[Any, Any]:
    """MiniLM as it is, with a pooler and a head taught on its first tokens."""
    from transformers import BertForSequenceClassification

    encoder, tokenizer = minilm()
    first = []
    with torch.no_grad():
        for start in range(0, len(sentences), 64):
            batch = tokenizer(list(sentences[start : start + 64]), padding=True, truncation=True,
                              return_tensors="pt")  # fmt: skip
            first.append(encoder(**batch)[0][:, 0])
    features = torch.cat(first)
    torch.manual_seed(seed)
    model: Any = BertForSequenceClassification.from_pretrained(minilm_path(), num_labels=2)
    model.bert.load_state_dict(encoder.state_dict())
    head = nn.Sequential(model.bert.pooler.dense, nn.Tanh(), nn.Dropout(0.1), model.classifier)
    optimizer = torch.optim.AdamW(head.parameters(), 1e-3, weight_decay=0.01)
    for _ in range(20):
        for chosen in torch.randperm(len(features)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(head(features[chosen]), labels[chosen]).backward()
            optimizer.step()
    return model.eval(), tokenizer


def text(seeds: Sequence[int]) -> None:
    """Film reviews in which he and she, John and Mary change places."""
    found: Found = {}
    sentences, labels = reviews()
    taught, asked = 4000, 3000
    for seed in seeds:
        model, tokenizer = review_classifier(sentences[:taught], labels[:taught], seed)
        rest = sentences[taught : taught + asked], labels[taught : taught + asked]
        for number, width in enumerate(("W8A8", "W4A8", "W4A4")):
            w, a = WIDTHS[width]
            both = [
                qtk.quantize(model, w=w, a=a, calib=sentences[start : start + CALIBRATION],
                             tokenizer=tokenizer, preset="fast", progress=False)
                for start in (seed * CALIBRATION, (seed + 5) * CALIBRATION)
            ]  # fmt: skip
            seen = qtk.fairness(model, both[0], rest[0], SWAPS, rest[1], tokenizer, second=both[1],
                                seed=seed)  # fmt: skip
            for figure in seen.figures:
                head = f"reviews: {figure.name}"
                if number == 0:
                    note(found, head, "float", 100 * figure.on_float)
                note(found, head, width, 100 * figure.on_quantized)
            for churn in seen.churn:
                head = f"reviews: changed by rounding, {churn.group}"
                note(found, head, width, 100 * churn.changed / churn.samples)
                second = 100 * (churn.second or 0) / churn.samples
                note(found, f"{head}, second seed", width, second)
            note(found, "reviews: sentences with a counterpart, number", "float", seen.samples)
        keep(found)


PARTS: dict[str, Callable[[Sequence[int]], None]] = {
    "census": census,
    "retrain": retraining,
    "adult": real("census", "Adult", ADULT, ("age", "fnlwgt", "gain", "loss", "hours"), "sex", 3),
    "credit": real("credit", "German credit", CREDIT, ("column 1", "column 4"), "sex", 20),
    "text": text,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    options = parser.parse_args()
    for part in options.parts or PARTS:
        PARTS[part](options.seeds)


if __name__ == "__main__":
    main()
