"""The README.md of a saved folder: what was quantized, how, what it cost, and how to load it."""

from collections import Counter
from pathlib import Path
from typing import Any

from qtk.record import Layer, Record

NAME = "README.md"
OURS = "<!-- written by qtk; replaced at the next save -->"


def may_write(folder: Path) -> bool:
    """Whether a folder has no README.md, or one of ours."""
    file = folder / NAME
    try:
        return not file.exists() or OURS in file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False


def card(cls: str, record: Record, stored: int, plain: bool = False) -> str:
    """The text, in the form that model hubs show.

    Args:
        cls: the model's class.
        stored: bytes of all weights on disk.
        plain: whether it is a network that the reader has to give.
    """
    library, call, others = "transformers", 'qtk.load("this/folder")', (
        "`transformers.AutoModel.from_pretrained` reads it too, after `import qtk`. "
    )  # fmt: skip
    if plain:
        library, call, others = "pytorch", f'qtk.load("this/folder", {cls}())', ""
    return "\n".join([
        "---", f"library_name: {library}", "tags: [qtk, quantized]", "---", OURS, "",
        f"# {cls}, quantized by qtk", "", *_what(record, stored), "", "## How", "",
        *_how(record), "", "## Measured", "", *_measured(record.layers), "", "## Load", "",
        "```python", "import qtk", "", f"model = {call}",
        "print(qtk.summary(model).table())", "```", "",
        f"{others}Each tensor has a checksum in its file, which `qtk.load` compares.", "",
    ])  # fmt: skip


def _what(record: Record, stored: int) -> list[str]:
    schemes = Counter(layer.scheme.name for layer in record.layers.values())
    layers = ", ".join(f"{n} in {scheme}" for scheme, n in sorted(schemes.items())) or "none"
    attention = "floating point" if record.attention is None else record.attention.name
    return [
        f"Quantized layers: {layers}. Attention: {attention}. Weights on disk: {stored:,} bytes."
    ]


def _how(record: Record) -> list[str]:
    recipe, lines = record.recipe, ["| | |", "|---|---|"]
    for name in ("method", "rounding", "ranges", "calibration_batches", "seed"):
        if recipe.get(name) is not None:
            lines.append(f"| {name.replace('_', ' ')} | {_cell(recipe[name])} |")
    learning = recipe.get("learning")
    if learning:
        kept = "kept" if learning["changed"] else "not kept: held-out data did not confirm it"
        lines.append(f"| learning | {_cell(learning['of'])}, {kept} |")
    return lines


def _measured(layers: dict[str, Layer]) -> list[str]:
    """The error of the layers' outputs on the calibration data."""
    found = {name: layer.sqnr for name, layer in layers.items() if layer.sqnr is not None}
    if not found:
        return [
            "Nothing: there was no calibration data, or learning came after. `qtk eval` does it."
        ]
    worst = min(found, key=found.__getitem__)
    mean = sum(found.values()) / len(found)
    return [
        f"Signal to quantization noise at the outputs of {len(found)} layers, on calibration data: "
        f"mean {mean:.1f} dB, lowest {found[worst]:.1f} dB ({_cell(worst)}). What the whole model "
        "lost, `qtk eval` measures.",
    ]


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")[:200]
