"""Does an assessor of naturalness survive rounding, and which patches fool the small ViT naturally?

python -m benchmarks.trust_natural --folder FOLDER

Figures go to benchmarks/results/trust_natural.json as they are measured, the contact sheet to
FOLDER/naturalness.png. FOLDER keeps assessors and patches.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qtk
from benchmarks import data
from benchmarks.result import read, result, write
from benchmarks.trust_robust import CALIBRATION, NORMALIZE, pixels
from qtk.intervals import Figure
from qtk.physical import naturalness as dpa
from qtk.physical import ratings
from qtk.physical.assessment import assess, looked, map_correlation, spearman

SEEDS = (0, 1, 2)
WIDTHS = {"W8A8": (8, 8), "W4A8": (4, 8), "W4A4": (4, 4)}
COLUMNS = ["figure", "float", "W8A8", "W4A8", "W4A4"]
IMAGES, TEST = 8_000, 1_000  # each of the first has two patches to learn from
CRAFT, JUDGED = 200, 300
STEPS, ROWS = 25, 32
NOTES = (
    "a proxy: CIFAR-10 with a patch, rated by a formula of colour, spectrum, area and variation "
    "(qtk/physical/ratings.py). Assessor: ViT of 3 layers, width 64, patches of 4 pixels, 16,000 "
    "rated images, 5 epochs; SROCC and RMSE with the formula on 1,000 others; preset fast, 256 "
    "calibration images, the quantized cells with the difference to float and its 95 % interval"
)
PATCHES = (
    ". Patches: 8 pixels, learned on 200 test images of CIFAR-10 at 8 places, 25 steps of 32, "
    "shown on 300 others, against the small ViT (W4A4: default preset, 128 calibration images); "
    "fooled: % of the images that are right without a patch. Naturalness 1 to 5 by the formula, in "
    "brackets by the assessor that was in the loss and by another one, the judge"
)
Table = dict[str, dict[str, str]]


def note(found: Table, figure: str, column: str, text: str) -> None:
    found.setdefault(figure, {})[column] = text


def keep(found: Table) -> None:
    kept = read("trust_natural")
    rows = {row[0]: row for row in kept.get("rows", [])}
    rows |= {figure: [figure, *(cells.get(c, "-") for c in COLUMNS[1:])]
             for figure, cells in found.items()}  # fmt: skip
    notes = NOTES + PATCHES * any(figure.startswith("patch") for figure in rows)
    write("trust_natural", result("Naturalness after rounding", COLUMNS, list(rows.values()), notes,
                                  kept=kept))  # fmt: skip


def assessor(rated: ratings.Rated, seed: int, attentive: float, folder: Path) -> dpa.Assessor:
    """Kept once it is made."""
    file, model = folder / f"assessor-{seed}-{attentive:g}.pt", dpa.build(seed=seed)
    if file.exists():
        model.load_state_dict(torch.load(file))
        return model.eval()
    dpa.train(rated.images, rated.ratings, rated.gaze, model=model, attentive=attentive, seed=seed,
              progress=False)  # fmt: skip
    torch.save(model.state_dict(), file)
    return model


def quantized(model: nn.Module, images: Tensor, width: str, seed: int) -> nn.Module:
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:256]
    w, a = WIDTHS[width]
    calib = [{"pixel_values": images[chosen] * 2 - 1}]
    return qtk.quantize(model, w=w, a=a, calib=calib, preset="fast", progress=False)


def ranking(found: Table, models: list[dpa.Assessor], train: Tensor, test: ratings.Rated) -> None:
    """The assessors' order of images, float and quantized."""
    for seed, model in enumerate(models):
        for width in WIDTHS:
            both = [quantized(model, train, width, seed + more) for more in (0, 100)]
            seen = assess(model, both[0], test.images, test.truth, test.gaze, second=both[1])
            for figure in seen.figures:
                head = f"assessor {seed}: {figure.name}"
                note(found, head, "float", f"{figure.on_float:.3f}")
                note(found, head, width, _cell(figure))
            note(
                found, f"assessor {seed}: SROCC with the float one", width, f"{seen.agreement:.4f}"
            )
        keep(found)


def _cell(figure: Figure) -> str:
    apart = f"{figure.difference:+.4f}, {figure.low:+.4f} to {figure.high:+.4f}"
    return f"{figure.on_quantized:.3f} ({apart}; floor {figure.floor:.4f})"


def victim(folder: Path, seed: int) -> nn.Module:
    """The small ViT in W4A4."""
    kept = folder / f"w4a4-{seed}"
    if not (kept / "config.json").exists():
        calib, _ = data.cifar10("train", CALIBRATION, seed)
        made: Any = qtk.quantize(data.vit(), w=4, a=4, calib=[{"pixel_values": calib}], seed=seed,
                                 progress=False)  # fmt: skip
        made.save_pretrained(kept)
    return qtk.load(kept)


def patches(found: Table, models: list[dpa.Assessor], folder: Path, seed: int) -> None:
    """Success against naturalness on the float ViT and on W4A4."""
    x, y = pixels("test", CRAFT + JUDGED, seed)
    seen = qtk.naturalness(
        data.vit(), victim(folder, seed), (x[:CRAFT], y[:CRAFT]), (x[CRAFT:], y[CRAFT:]),
        models[0], models[1], normalize=NORMALIZE, steps=STEPS, rows=ROWS,
        resume=folder / "patches", seed=seed, progress=False,
    )  # fmt: skip
    print(seen.table(), flush=True)
    told: dict[str, list[list[float]]] = {}
    for p in seen.points:
        head = f"patch seed {seed}: {p.crafted}, weight {p.weight:g}: fooled"
        judged = f"naturalness {p.formula:.2f} ({p.assessor:.2f}, {p.judge:.2f})"
        note(found, head, "float", f"{100 * p.lost / p.right:.1f}, {judged}")
        note(found, head, "W4A4", f"{100 * p.lost_quantized / p.right_quantized:.1f}")
        told.setdefault(p.crafted, []).append([p.weight, p.lost / p.right])
    for crafted in ("float", "quantized"):
        weights, success = torch.tensor(told[crafted]).double().T.numpy()
        head = f"patch seed {seed}: rank correlation of weight and success on float"
        column = "float" if crafted == "float" else "W4A4"
        note(found, head, column, f"{spearman(weights, success):.2f}")
    for f in (*seen.fronts, *seen.differences):
        head = f"patch seed {seed}: hypervolume by {f.judge}, crafted on {f.crafted}, {f.reader}"
        column = "float" if f.reader == "float" else "W4A4"
        note(found, head, column, f"{f.volume:.4f} ({f.low:+.4f} to {f.high:+.4f})")
    if seed == 0:
        seen.contact_sheet(folder / "naturalness.png")
    keep(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, default=Path("natural-out"))
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    options = parser.parse_args()
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    images, _ = pixels("train", IMAGES)
    train = ratings.draw(torch.cat([images, images.flip(-1)]), 0)
    test, found = ratings.draw(pixels("test", TEST)[0], 1), Table()
    models = [assessor(train, seed, dpa.ATTENTIVE, folder) for seed in (0, 1)]
    blind = assessor(train, 0, 0.0, folder)
    for name, model in (("with", models[0]), ("without", blind)):
        alike = float(map_correlation(looked(model, test.images), test.gaze).mean())
        note(found, f"map and gaze, {name} the attentive prior", "float", f"{alike:.3f}")
    ranking(found, models, train.images, test)
    for seed in options.seeds:
        patches(found, models, folder, seed)


if __name__ == "__main__":
    main()
