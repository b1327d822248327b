"""What a transform does to outlier channels: the picture that the README opens with.

    python -m benchmarks.accuracy.channel_ranges

On all-MiniLM-L6-v2 and 256 sentences of STS-B train, it takes the LayerNorm output with the widest
channel beside the others, and draws from what to what each channel reaches, as it comes and as the
quantizers of W8A8 and W4A4 see it. Every panel is in units of its own root mean square, so that its
height is what a grid has to span. Writes benchmarks/results/channel_ranges.png.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import data
from benchmarks.accuracy.table import quantize
from benchmarks.result import RESULTS
from qtk.assembly import quantized_layers
from qtk.models import describe

INK, BARS = "#111827", "#1d4ed8"
PANELS: dict[str, dict[str, Any]] = {  # the transforms of the default recipes
    "W8A8, after shift and scale": {"w": 8, "a": 8, "method": "os+", "rounding": "nearest"},
    "W4A4, after scale and rotation": {
        "w": 4, "a": 4, "method": "equalize+rotate", "rounding": "nearest",
    },
}  # fmt: skip


@torch.no_grad()
def inputs_of(model: nn.Module, names: list[str], batches: list[dict[str, Tensor]]) -> list[Tensor]:
    """[T, K] that each linear reads of all real tokens."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    mask = torch.ones(0)
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(args[0][mask])
        )
        for name in names
    ]
    for batch in batches:
        mask = batch["attention_mask"].bool()
        model(**batch)
    for handle in handles:
        handle.remove()
    return [torch.cat(seen[name]) for name in names]


def outlier(x: Tensor) -> float:
    """The widest channel's range over the median channel's; x [T, K]."""
    width = x.amax(0) - x.amin(0)
    return float(width.max() / width.median())


def measure() -> tuple[str, dict[str, Tensor]]:
    """The site's name, and by panel [T, K] in units of the root mean square."""
    model, tokenizer = data.minilm()
    texts = data.stsb_calibration(0)
    batches = [
        dict(tokenizer(texts[i : i + 32], padding=True, return_tensors="pt"))
        for i in range(0, len(texts), 32)
    ]
    readers = [g.linears[0] for block in describe(model) for g in block.groups if g.norm]
    read = dict(zip(readers, inputs_of(model, readers, batches), strict=True))
    site = max(read, key=lambda name: outlier(read[name]))
    panels = {"float32, as it comes": read[site]}
    for title, options in PANELS.items():
        layer: Any = quantized_layers(quantize(model, batches, options, 0))[site]
        panels[title] = layer.grid.change.inputs(read[site])
    return site, {title: x / x.square().mean().sqrt() for title, x in panels.items()}


def plot(site: str, panels: dict[str, Tensor], path: Path) -> None:
    """A bar a channel, from its smallest to its largest value."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, row = plt.subplots(1, len(panels), figsize=(10, 3.6), sharey=True, layout="constrained")
    for axes, (title, x) in zip(row, panels.items(), strict=True):
        lo, hi = x.amin(0), x.amax(0)
        axes.vlines(range(len(lo)), lo, hi, color=BARS, linewidth=0.8)
        axes.set_title(title, color=INK, fontsize=11)
        axes.set_xlabel("channel", color=INK)
        axes.text(
            0.97, 0.96, f"spans {float(hi.max() - lo.min()):.0f} RMS", color=INK, fontsize=10,
            transform=axes.transAxes, ha="right", va="top",
        )  # fmt: skip
        axes.margins(x=0.01)
        axes.grid(axis="y", alpha=0.25)
    row[0].set_ylabel("range over 256 sentences, RMS", color=INK)
    figure.suptitle(f"all-MiniLM-L6-v2: what {site} reads", color=INK, fontsize=11)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    plot(*measure(), RESULTS / "channel_ranges.png")
