"""Plots as inline SVG that takes the page's font and its text colour, in light and in dark."""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from qtk.errors import QtkError

INK = "#010203"  # stands for the page's text colour; no plot uses it otherwise
COLORS = ("#8b93a1", "#3b82f6", "#ea7331", "#2aa876", "#b05cd6")  # float first; fit both grounds
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "qtk",
    "font.size": 10,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.6,
}


def layer_errors(series: Mapping[str, Sequence[float | None]], kinds: Sequence[str]) -> str:
    """SQNR of every linear: a panel a kind, a line a scheme, the blocks from left to right.

    Args:
        series: scheme -> dB of all linears in order, block after block.
        kinds: names of the linears of one block, in order.
    """
    with _style():
        figure, axes = _subplots(1, len(kinds), (9.2, 2.6), sharey=True)
        for k, (axis, kind) in enumerate(zip(axes, kinds, strict=True)):
            blocks = 1
            for color, (name, values) in zip(COLORS[1:], series.items(), strict=False):
                own = [float("nan") if v is None else v for v in values[k :: len(kinds)]]
                blocks = len(own)
                axis.plot(range(blocks), own, "o-", ms=4, lw=1.5, color=color, label=name)
            axis.set_title(kind)
            axis.grid(axis="y")
            axis.set_xticks(range(0, blocks, -(-blocks // 6)))
            axis.set_xlim(-0.4, blocks - 0.6)
        axes[0].set_ylabel("SQNR, dB")
        axes[0].set_ylim(bottom=0)
        figure.supxlabel("block", fontsize=10)
        handles = axes[0].get_legend_handles_labels()
        figure.legend(*handles, ncols=len(series), loc="outside upper right")
        return _svg(figure)


def channel_ranges(panels: Mapping[str, Tensor]) -> str:
    """Smallest to largest value of every channel.

    Args:
        panels: title -> [2, K]; the first is what the others were made of.
    """
    with _style():
        figure, axes = _subplots(1, len(panels), (9.2, 2.7))
        for axis, color, (title, ranges) in zip(axes, COLORS, panels.items(), strict=False):
            lo, hi = ranges.tolist()
            axis.fill_between(range(len(lo)), lo, hi, step="mid", color=color, lw=0)
            axis.axhspan(min(lo), max(hi), color=color, alpha=0.12, lw=0)
            axis.set_title(title)
            axis.set_xlim(-1, len(lo))
            axis.set_xlabel("channel")
            axis.grid(axis="y")
        axes[0].set_ylabel("value")
        return _svg(figure)


def pareto(points: Mapping[str, tuple[float, float, float, bool]]) -> str:
    """Fidelity against size, the larger the mark the slower.

    Args:
        points: name -> MB, SQNR in dB, milliseconds, and whether nothing beats it.
    """
    with _style():
        figure, (axis,) = _subplots(1, 1, (6.4, 3.2))
        slowest = max(ms for _, _, ms, _ in points.values())
        for name, (size, sqnr, ms, is_best) in points.items():
            fill = COLORS[1] if is_best else "none"
            axis.scatter(size, sqnr, s=30 + 120 * ms / slowest, color=fill, edgecolors=COLORS[1])
            axis.annotate(f"{name}, {ms:.1f} ms", (size, sqnr), (7, 4), textcoords="offset points")
        axis.set_xlabel("MB")
        axis.set_ylabel("SQNR, dB")
        axis.grid()
        axis.margins(0.2)
        return _svg(figure)


def bars(panels: Mapping[str, Mapping[str, float]], unit: str, better: str, worse: str) -> str:
    """Horizontal bars, a panel each with its own scale; each bar says its value and its ratio.

    Args:
        panels: title -> name -> value; the first value of a panel is what the others are held to.
        unit: of the values.
        better, worse: what a ratio above or below one is called: "smaller", "larger".
    """
    height = 0.55 + 0.36 * max(len(values) for values in panels.values())
    with _style():
        figure, axes = _subplots(len(panels), 1, (4.6, height * len(panels)))
        for axis, (title, values) in zip(axes, panels.items(), strict=True):
            colors = [COLORS[i % len(COLORS)] for i in range(len(values))]
            axis.barh(range(len(values)), values.values(), color=colors, height=0.62)
            first = next(iter(values.values()))
            for i, value in enumerate(values.values()):
                text = _figures(value, unit) + (_ratio(first, value, better, worse) if i else "")
                axis.annotate(text, (value, i), (6, 0), textcoords="offset points", va="center",
                              fontsize=9.5)  # fmt: skip
            axis.set_yticks(range(len(values)), list(values))
            axis.invert_yaxis()
            axis.set_xlim(0, 1.8 * max(values.values()))
            axis.set_xticks([])
            axis.spines["bottom"].set_visible(False)
            axis.tick_params(left=False)
            axis.set_title(title)
        figure.get_layout_engine().set(hspace=0.12)
        return _svg(figure)


def columns(panels: Mapping[str, Sequence[float]]) -> str:
    """Upright bars, a panel each with its own scale.

    Args:
        panels: title -> heights from left to right.
    """
    with _style():
        across = min(2, len(panels))
        figure, axes = _subplots(-(-len(panels) // across), across, (9.2, 1.9 * len(panels)))
        for axis, (title, heights) in zip(axes, panels.items(), strict=False):
            axis.bar(range(len(heights)), heights, width=0.9, color=COLORS[1])
            axis.set_title(title)
            axis.set_xticks([])
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        return _svg(figure)


def front(
    predicted: Sequence[tuple[float, float]], measured: Sequence[tuple[str, float, float]],
    references: Sequence[tuple[str, float, float]], xlabel: str, ylabel: str,
) -> str:  # fmt: skip
    """A front as predicted, points of it as measured, and whole models beside it.

    Args:
        predicted: (x, y), from left to right.
        measured, references: (name, x, y).
    """
    with _style():
        figure, (axis,) = _subplots(1, 1, (6.4, 3.6))
        axis.plot(*zip(*predicted, strict=True), "o-", ms=3, lw=1.5, color=COLORS[1],
                  label="predicted front")  # fmt: skip
        for points, marker, color, label in (
            (references, "s", COLORS[0], "one scheme, predicted"),
            (measured, "D", COLORS[2], "measured"),
        ):
            shown = [point for point in points if point[2] > 0]
            axis.plot([x for _, x, _ in shown], [y for *_, y in shown], marker, ms=5, color=color,
                      label=label)  # fmt: skip
            for name, x, y in shown:
                axis.annotate(name, (x, y), (5, 4), textcoords="offset points", fontsize=8.5)
        axis.set_yscale("log")
        axis.set_xlabel(xlabel)
        axis.set_ylabel(ylabel)
        axis.grid(axis="y")
        axis.legend()
        return _svg(figure)


def matrix(
    rows: Sequence[str], columns: Sequence[str], shares: Sequence[Sequence[float]],
    down: str, across: str,
) -> str:  # fmt: skip
    """Shares as shaded squares with their per cent, darker where there is more.

    Args:
        shares: a row each, 0 to 1.
        down, across: what rows and columns are.
    """
    size = (1.6 + 0.75 * len(columns), 0.9 + 0.42 * len(rows))
    with _style():
        figure, (axis,) = _subplots(1, 1, size)
        for i, values in enumerate(shares):
            for j, share in enumerate(values):
                box = (j - 0.5, i - 0.5)
                axis.add_patch(_square(box, share))
                axis.annotate(f"{100 * share:.0f}", (j, i), ha="center", va="center")
        axis.set_xlim(-0.5, len(columns) - 0.5)
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.set_xticks(range(len(columns)), columns)
        axis.set_yticks(range(len(rows)), rows)
        axis.xaxis.tick_top()
        axis.xaxis.set_label_position("top")
        axis.tick_params(length=0)
        for side in ("left", "bottom"):
            axis.spines[side].set_visible(False)
        axis.set_xlabel(across)
        axis.set_ylabel(down)
        return _svg(figure)


def _square(corner: tuple[float, float], share: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(corner, 1, 1, color=COLORS[1], alpha=0.05 + 0.75 * share, lw=0)


def _figures(value: float, unit: str) -> str:
    return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def _ratio(first: float, value: float, better: str, worse: str) -> str:
    """How the value stands to the first one, in words."""
    if not value or not first:
        return ""
    return (
        f" ({first / value:.1f}x {better})"
        if value <= first
        else f" ({value / first:.1f}x {worse})"
    )


@contextmanager
def _style() -> Iterator[None]:
    try:
        from matplotlib import rc_context
    except ImportError:
        raise QtkError("plots need matplotlib: pip install 'qtk-torch[plots]'") from None
    with rc_context(STYLE):
        yield


def _subplots(rows: int, columns: int, size: tuple[float, float], **kwargs: Any) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **kwargs).flat)


def _svg(figure: Any) -> str:
    """The figure as an element to put into a page."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*pt"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*pt"', r"\1", text, count=1)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px var(--sans)", text)
    return re.sub(r"\s*\n\s*", "\n", text.replace(INK, "currentColor"))
