"""What corruptions and system noise cost the small ViT in 8, 6 and 4 bits, beside floating point.

    python -m benchmarks.trust_system corruptions | system | grid ... [--images N] [--bits B ...]
                                      [--severities S ...] [--folder FOLDER]

writes benchmarks/results/trust_system.json, whose other figures stay. The images are JPEG files of
CIFAR-10's test split, so that decoders matter.
"""

import argparse
import random
import tarfile
from functools import cache
from pathlib import Path

import qtk
from benchmarks import data
from benchmarks.result import read, result, versions_of, write
from benchmarks.trust_robust import COLUMNS, FIGURES, NORMALIZE, quantized
from qtk.robust import Robustness

NOTES = (
    "points that accuracy falls by, mean and, after a semicolon, worst of the rows; floor: the "
    "largest difference between two calibration seeds in one row, where measured; amplified: how "
    "much more the quantized model loses on average; CIFAR-10 test images; corruptions at three "
    "times their size; resizers shrink from 48 to 32 pixels; calibrated on clean training images"
)


@cache
def files(n: int, seed: int = 0) -> list[tuple[bytes, int]]:
    """JPEG files of the test split, drawn, and their labels."""
    archive = data.SHARED / "data" / "cifar10-jpeg" / "cifar10_test_jpeg.tar.xz"
    with tarfile.open(archive) as tar:
        found = {m.name: tar.extractfile(m).read() for m in tar if m.isfile()}  # type: ignore[union-attr]
    chosen = random.Random(seed).sample(sorted(found), n)
    return [(found[name], data.CLASSES.index(name.split("/")[1])) for name in chosen]


def shown(found: Robustness, bits: int, rows: list[list[str]]) -> list[list[str]]:
    """The rows with one more column filled."""
    cells = {row[0]: row for row in rows}

    def line(name: str) -> list[str]:
        title = f"{name}, {found.samples} images"
        return cells.setdefault(title, [title, *["-"] * (len(COLUMNS) - 1)])

    clean, at = found.row("clean"), FIGURES[bits]
    line("clean accuracy")[1] = f"{100 * clean.accuracy_float:.1f}"
    line("clean accuracy")[at] = f"{100 * clean.accuracy_quantized:.1f}"
    for name, facts in found.summary().items():
        for side, column in (("float", 1), ("quantized", at)):
            line(name)[column] = (
                f"{100 * facts[f'drop_{side}']:.2f}; {100 * facts[f'worst_{side}']:.1f}, "
                f"{facts[f'worst_row_{side}']}"
            )
        line(f"{name}: amplified by")[at] = f"{100 * facts['amplification']:+.2f}"
        if facts.get("mce"):
            line(f"{name}: mCE, float = 1")[at] = f"{facts['mce']:.3f}"
    for kind, value in found.floor.items():
        line(f"{kind}: floor")[at] = f"{100 * value:.1f}"
    return list(cells.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("parts", nargs="*", default=["corruptions", "system", "grid"])
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 6, 4])
    parser.add_argument("--severities", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--folder", type=Path, default=Path("trust-out"))
    args = parser.parse_args()
    for part in args.parts:
        for bits in args.bits:
            found = qtk.robustness(
                data.vit(), quantized(bits, args.folder), files(args.images), part,
                str(data.SHARED / "models" / "vit-cifar10"), normalize=NORMALIZE,
                severities=args.severities, resume=args.folder / "cells", progress=False,
                sheet=args.folder / "sheet.png" if part == "corruptions" else None,
            )  # fmt: skip
            print(found.table(), flush=True)
            kept = read("trust_system")
            rows = shown(found, bits, kept.get("rows", []))
            versions = versions_of(
                "qtk", "torch", "transformers", "pillow", "opencv-python-headless",
                "imagecorruptions-imaug",
            )  # fmt: skip
            write("trust_system", result("Corruptions and system noise in fewer bits", COLUMNS,
                                         rows, NOTES, versions=versions, kept=kept))  # fmt: skip


if __name__ == "__main__":
    main()
