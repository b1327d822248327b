"""Plots as inline SVG that takes the page's font and its text colour, in light and in dark."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from qtk.errors import QtkError

INK = "#010203"  # stands for the page's text colour; no plot uses it otherwise
COLORS = ("#8b93a1", "#3b82f6", "#ea7331", "#2aa876", "#b05cd6")  # float first; fit both grounds
STYLE = {
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
    figure, axes = _subplots(1, len(kinds), (9.2, 2.5), sharey=True)
    for k, (axis, kind) in enumerate(zip(axes, kinds, strict=True)):
        for color, (name, values) in zip(COLORS[1:], series.items(), strict=False):
            own = [float("nan") if v is None else v for v in values[k :: len(kinds)]]
            axis.plot(range(len(own)), own, "o-", ms=4, lw=1.4, color=color, label=name)
        axis.set_title(kind)
        axis.grid(axis="y")
        axis.set_xticks(range(len(own)))
        axis.set_xlim(-0.4, len(own) - 0.6)
    axes[0].set_ylabel("SQNR, dB")
    axes[0].set_ylim(bottom=0)
    figure.supxlabel("block", fontsize=10)
    figure.legend(
        *axes[0].get_legend_handles_labels(), ncols=len(series), loc="upper right",
        bbox_to_anchor=(1, 1.12),
    )  # fmt: skip
    return _svg(figure)


def channel_ranges(before: Tensor, after: Tensor) -> str:
    """Smallest to largest value of every channel, before and after shift and scale.

    Args:
        before, after: [2, K].
    """
    figure, axes = _subplots(1, 2, (9.2, 2.7))
    for axis, (low, high), color, title in zip(
        axes, (before, after), (COLORS[0], COLORS[1]), ("before", "after shift and scale"),
        strict=True,
    ):  # fmt: skip
        axis.vlines(range(len(low)), low.tolist(), high.tolist(), color=color, lw=1.1)
        reach = float(high.max() - low.min())
        axis.axhspan(float(low.min()), float(high.max()), color=color, alpha=0.10, lw=0)
        axis.set_title(f"{title}: the grid spans {reach:.1f}")
        axis.set_xlim(-1, len(low))
        axis.set_xlabel("channel")
        axis.grid(axis="y")
    axes[0].set_ylabel("value")
    return _svg(figure)


def bars(panels: Mapping[str, Mapping[str, float]], unit: str, better: str) -> str:
    """Horizontal bars, a panel each with its own scale; each bar says its value and its ratio.

    Args:
        panels: title -> name -> value; the first value of a panel is what the others are held to.
        unit: of the values.
        better: what a ratio above one is called: "smaller", "faster".
    """
    height = 0.55 + 0.36 * max(len(values) for values in panels.values())
    figure, axes = _subplots(len(panels), 1, (4.5, height * len(panels)))
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        first = next(iter(values.values()))
        colors = [COLORS[i % len(COLORS)] for i in range(len(values))]
        axis.barh(range(len(values)), values.values(), color=colors, height=0.62)
        for i, value in enumerate(values.values()):
            ratio = f"  {first / value:.2f}x {better}" if i and value else ""
            axis.annotate(
                f"{value:.3g} {unit}{ratio}", (value, i), (5, 0), textcoords="offset points",
                va="center", fontsize=9,
            )  # fmt: skip
        axis.set_yticks(range(len(values)), list(values))
        axis.invert_yaxis()
        axis.set_xlim(0, 1.75 * max(values.values()))
        axis.set_xticks([])
        axis.spines["bottom"].set_visible(False)
        axis.tick_params(left=False)
        axis.set_title(title)
    return _svg(figure)


def _subplots(rows: int, columns: int, size: tuple[float, float], **kwargs: Any) -> Any:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise QtkError("plots need matplotlib: pip install 'qtk[plots]'") from None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, **kwargs)
    return figure, list(axes.flat)


def _svg(figure: Any) -> str:
    """The figure as an element to put into a page."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(
            buffer, format="svg", transparent=True, bbox_inches="tight", pad_inches=0.04,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )  # fmt: skip
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*pt"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*pt"', r"\1", text, count=1)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px var(--sans)", text)
    return re.sub(r"\s*\n\s*", "\n", text.replace(INK, "currentColor"))
