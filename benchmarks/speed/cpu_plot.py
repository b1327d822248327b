"""The picture of speed and fidelity on a CPU, drawn from the result file.

    python -m benchmarks.speed.cpu_plot

reads benchmarks/results/cpu_minilm.json and writes cpu_minilm.png beside it.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.result import RESULTS, read

SIZE = "16x128"  # sentences and tokens each
SAME = 1e-6  # an error that is none: float32 in other words
INK, OURS, OTHERS = "#111827", "#b91c1c", "#475569"
RADIUS = 5  # pixels of a point
NEAR = 10  # points; a label further off has a line to its point
OFFSETS = [  # of a label from its point, in points, and the side of the text that is there
    (7, 0, "left"), (-7, 0, "right"),
    *((x, y * far, side) for far in (10, 20, 30, 40) for x, side in ((0, "center"), (6, "left"),
      (-6, "right")) for y in (1, -1)),
]  # fmt: skip


def points(found: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Speed over float32 and 1 - cosine of everything that is not float32."""
    ms, cosines = found["milliseconds"][SIZE], found["cosine"]
    errors = {name: 1 - cosine for name, cosine in cosines.items() if 1 - cosine > SAME}
    return {name: (ms["float32"] / ms[name], error) for name, error in errors.items()}


def plot(found: dict[str, Any], path: Path) -> None:
    """A point for each contender, its name beside it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    places = points(found)
    for name, place in places.items():
        axes.scatter(*place, s=36, color=OURS if name.startswith("qtk") else OTHERS, zorder=3)
    axes.set_yscale("log")
    axes.set_xlim(0, 1.15 * max(speed for speed, _ in places.values()))
    errors = [error for _, error in places.values()]
    axes.set_ylim(2.5 * max(errors), min(errors) / 2.5)  # downwards: the better the higher
    nines = [10.0**-k for k in range(1, 7) if min(errors) / 2.5 < 10.0**-k < 2.5 * max(errors)]
    axes.set_yticks(nines, [f"{1 - error:.6f}".rstrip("0") for error in nines])
    axes.minorticks_off()
    axes.axvline(1, color=OTHERS, linewidth=1, linestyle="--", zorder=1)
    axes.grid(alpha=0.25)
    shape = SIZE.replace("x", " sentences of ")
    axes.set_xlabel(f"speed over float32, {shape} tokens", color=INK, loc="left")
    axes.set_ylabel("cosine of embeddings to float32's", color=INK)
    axes.set_title(f"{found['title']}: upper right is better", color=INK, loc="left")
    figure.text(1, 0, found["hardware"], fontsize=7, color=OTHERS, ha="right", va="bottom")
    axes.text(1.02, 2 * max(errors), "float32", fontsize=8, color=OTHERS)
    label(figure, axes, places)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def label(figure: Any, axes: Any, places: dict[str, tuple[float, float]]) -> None:
    """Names beside the points, each where it covers nothing and stays inside the frame."""
    figure.canvas.draw()  # fixes where everything is
    frame = axes.get_window_extent()
    dots = [axes.transData.transform(place) for place in places.values()]
    taken = [text.get_window_extent() for text in axes.texts]
    for name, place in sorted(places.items(), key=lambda item: item[1]):
        color = OURS if name.startswith("qtk") else INK
        for x, y, side in OFFSETS:
            text = axes.annotate(
                name, place, (x, y), textcoords="offset points", ha=side, va="center",
                fontsize=8, color=color,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )  # fmt: skip
            box = text.get_window_extent().padded(2)
            inside = frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1)
            if inside and not covers(box, dots, taken):
                taken.append(box)
                if abs(y) > NEAR:
                    line = {"arrowstyle": "-", "color": OTHERS, "linewidth": 0.5}
                    axes.annotate(
                        "", place, (x, 0.7 * y), textcoords="offset points", arrowprops=line
                    )
                break
            text.remove()
        else:
            raise RuntimeError(f"no room for {name!r}: draw a larger picture")


def covers(box: Any, dots: Iterable[Any], boxes: Iterable[Any]) -> bool:
    """Whether a label lies over a point or another label."""
    near = box.padded(RADIUS)
    return any(near.contains(*dot) for dot in dots) or any(box.overlaps(other) for other in boxes)


if __name__ == "__main__":
    plot(read("cpu_minilm"), RESULTS / "cpu_minilm.png")
