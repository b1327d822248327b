"""Objects in X-ray images of drawn bags, made against one model and seen by the other.

python -m benchmarks.trust_physical --folder FOLDER

Figures go to benchmarks/results/trust_physical.json after every width, pictures to
benchmarks/results/xray.png. FOLDER keeps the classifier, shapes and places.
"""

import argparse
import statistics
from pathlib import Path

import torch
from torch import nn

import qtk
from benchmarks.result import RESULTS, result, write
from qtk.physical import classifier, scene
from qtk.physical.exposure import Effect, Row

SEEDS = (0, 1, 2)
WIDTHS = {"W8A8": (8, 8), "W6A6": (6, 6), "W4A8": (4, 8), "W4A4": (4, 4)}
COLUMNS = ["figure", "float", *WIDTHS]
TRAIN, TEST, CRAFT, JUDGED = 5_000, 500, 32, 200
CALIBRATION = 256
NOTES = (
    "accuracy in %, of drawn bags with an iron item of four kinds or none; mean of seeds of bags, "
    "places and calibration, smallest and largest in brackets. Classifier: 4 convolutions with "
    "BatchNorm, one of it, 5,000 bags, 12 epochs (a ViT of 4 layers: 65 % after 12 of 8,000). "
    "Two objects of 10 pixels, iron, learned on 32 bags in 24 steps, judged on 200 others a seed; "
    "placement: points of accuracy that looking for places costs beyond random ones; shape: that "
    "shaping costs beyond balls at the same places; kept: % of the cost of shaped objects that the "
    "other model has; intervals 95 %, paired bootstrap over bags. Preset fast, 256 calibration bags"
)
Found = dict[str, dict[str, list[float]]]  # figure -> column -> a value a seed
Told = dict[str, dict[str, str]]  # effects, with their intervals


def trained(folder: Path) -> nn.Module:
    """Kept once it is made."""
    file, model = folder / "classifier.pt", classifier.cnn()
    if file.exists():
        model.load_state_dict(torch.load(file))
        return model.eval()
    classifier.train(model, scene.draw(TRAIN, 100), progress=False)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), file)
    return model


def accuracy(model: nn.Module, bags: scene.Scenes) -> float:
    with torch.no_grad():
        right = [
            model(x).argmax(1) == y
            for x, y in zip(bags.images.split(250), bags.labels.split(250), strict=True)
        ]
    return 100 * float(torch.cat(right).double().mean())


def note(found: Found, figure: str, column: str, place: int, value: float) -> None:
    """Once a seed, though the float model is asked again with every width."""
    values = found.setdefault(figure, {}).setdefault(column, [])
    if len(values) <= place:
        values.append(value)


def count(found: Found, row: Row, width: str, place: int) -> None:
    own, rounded = (100 * n / row.samples for n in (row.correct, row.correct_quantized))
    if row.crafted == "quantized":
        note(found, f"{row.name}, crafted on each", width, place, rounded)
        note(found, f"{row.name}, crafted on each, seen by float", width, place, own)
    else:
        crafted = "" if row.crafted == "-" else ", crafted on float"
        note(found, f"{row.name}{crafted}", "float", place, own)
        note(found, f"{row.name}{crafted}", width, place, rounded)
        note(found, f"share of the item hidden: {row.name}{crafted}", "float", place,
             100 * row.hidden)  # fmt: skip


def tell(told: Told, effect: Effect, width: str, seed: int) -> None:
    text = f"{100 * effect.value:.1f} ({100 * effect.low:.1f} to {100 * effect.high:.1f})"
    if effect.name == "kept":
        head = "kept, float to each" if effect.crafted == "float" else "kept, each to float"
        column = width
    else:
        head, column = effect.name, "float" if effect.crafted == "float" else width
    told.setdefault(f"{head}, seed {seed}", {})[column] = text


def keep(found: Found, told: Told) -> None:
    rows = [
        [figure, *(_cell(columns.get(name, [])) for name in COLUMNS[1:])]
        for figure, columns in found.items()
    ]
    rows += [[figure, *(cells.get(name, "-") for name in COLUMNS[1:])]
             for figure, cells in told.items()]  # fmt: skip
    write("trust_physical", result("Objects in X-ray images", COLUMNS, rows, NOTES))
    for row in rows:
        print(*row, sep=" | ", flush=True)


def _cell(values: list[float]) -> str:
    if not values:
        return "-"
    spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, default=Path("xray-out"))
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    options = parser.parse_args()
    model = trained(options.folder)
    found, told, others = Found(), Told(), scene.draw(TEST, 101)
    note(found, f"{TEST:,} other bags", "float", 0, accuracy(model, others))
    print(found, flush=True)
    for place, seed in enumerate(options.seeds):
        calib = [scene.draw(CALIBRATION, 200 + seed).images]
        craft, test = scene.draw(CRAFT, 300 + seed), scene.draw(JUDGED, 400 + seed)
        for width, (w, a) in WIDTHS.items():
            qmodel = qtk.quantize(model, w=w, a=a, calib=calib, preset="fast", progress=False)
            note(found, f"{TEST:,} other bags", width, place, accuracy(qmodel, others))
            seen = qtk.xray(model, qmodel, craft, test, resume=options.folder / "kept", seed=seed,
                            progress=False)  # fmt: skip
            for row in seen.rows:
                count(found, row, width, place)
            for effect in seen.effects:
                tell(told, effect, width, seed)
            if width == "W4A4" and not place:
                seen.contact_sheet(RESULTS / "xray.png")
            keep(found, told)


if __name__ == "__main__":
    main()
