"""What corruptions and system noise cost the small ViT in 8, 6 and 4 bits, beside floating point.

    python -m benchmarks.trust_system corruptions | system | grid | findings ... [--images N]
                                      [--bits B ...] [--severities S ...] [--folder FOLDER]

writes benchmarks/results/trust_system.json, whose other figures stay. The images are JPEG files of
CIFAR-10's test split, so that decoders matter.

findings  what became of RobustMQ's, from these and from `trust_robust images` on the same images:
          benchmarks/results/trust_findings.json, and the page of `qtk robust` in --folder
"""

import argparse
import random
import tarfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import qtk
from benchmarks import data, trust_robust
from benchmarks.result import read, result, versions_of, write
from benchmarks.trust_robust import COLUMNS, FIGURES, NORMALIZE, quantized
from qtk.robust import Robustness, write_report
from qtk.robust.findings import findings
from qtk.robust.page import FOUND, told

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


def study(args: argparse.Namespace, suite: list[str], bits: int) -> Robustness:
    return qtk.robustness(
        data.vit(), quantized(bits, args.folder), files(args.images), suite,
        str(data.SHARED / "models" / "vit-cifar10"), normalize=NORMALIZE,
        second=quantized(bits, args.folder, seed=1), severities=args.severities,
        resume=args.folder / "cells", progress=False,
        sheet=args.folder / "sheet.png" if "corruptions" in suite else None,
    )  # fmt: skip


def write_findings(args: argparse.Namespace) -> None:
    """Attacks and noises of the same images, in two orders, as one study a bit width."""
    studies = {}
    attacks = argparse.Namespace(images=args.images, folder=args.folder, attacks=["attacks"])
    for bits in args.bits:
        first = trust_robust.images(attacks, bits)
        second = study(args, ["corruptions", "system", "grid"], bits)
        both = [one.row("clean").accuracy_quantized for one in (first, second)]
        assert both[0] == both[1], f"two sets of images: {both}"
        studies[f"W{bits}A{bits}"] = replace(
            first, rows=(*first.rows, *second.rows[1:]), notes=(*first.notes, *second.notes),
            floor=first.floor | second.floor,
        )  # fmt: skip
    write_report(studies, args.folder / "report")
    found = [told(finding) for finding in findings(studies)]
    notes = f"RobustMQ's networks were trained in few bits, these are not; {args.images} images"
    write("trust_findings", result("What RobustMQ found, and what is seen of it in the small ViT",
                                   FOUND, found, notes))  # fmt: skip


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
        if part == "findings":
            write_findings(args)
            continue
        for bits in args.bits:
            found = study(args, [part], bits)
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
