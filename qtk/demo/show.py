"""What the demo shows: one table as text, one page to read."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtk import __version__
from qtk.report import page, plots
from qtk.table import ruled

if TYPE_CHECKING:
    from qtk.demo import Results, Variant

KINDS = ("query", "key", "value", "attention out", "MLP in", "MLP out")
Row = tuple[str, str, Callable[["Variant"], str]]  # what, for the float model, for a variant


def table(results: "Results") -> str:
    """The measured figures as plain text, a column a model."""
    head = ["", "float", *_names(results)]
    return "\n".join([f"{results.model}, quantized", "", *ruled(head, rows(results))])


def rows(results: "Results") -> list[list[str]]:
    """The figures of every model: first what it is, then the float model, then the others."""
    spec: list[Row] = [
        ("cosine to float, mean", "1", lambda v: f"{v.fidelity.cosine:.4f}"),
        ("cosine to float, worst", "1", lambda v: f"{v.fidelity.worst_cosine:.4f}"),
        ("SQNR of the embeddings, dB", "-", lambda v: f"{v.fidelity.sqnr:.1f}"),
        ("same nearest neighbour", "100 %", lambda v: _percent(v.fidelity.agreement)),
    ]
    if results.spearman is not None:
        spec.append((
            "STS-B test, Spearman", f"{results.spearman:.2f}", lambda v: f"{v.spearman or 0:.2f}"
        ))  # fmt: skip
    float_linears = results.variants[0].summary.float_bytes
    spec += [
        ("linears, MB", f"{float_linears / 1e6:.2f}", lambda v: f"{v.summary.bytes / 1e6:.2f}"),
        ("file, MB", f"{results.file_bytes / 1e6:.1f}", lambda v: f"{v.file_bytes / 1e6:.1f}"),
    ]
    for shape, seconds in results.times.items():
        spec.append((f"{shape} tokens, ms", f"{1e3 * seconds:.1f}", _speed(shape, seconds)))
    spec += [
        ("linears compute in", "float32", _computes_in),
        ("seconds to quantize", "-", lambda v: f"{v.seconds:.0f}"),
        ("reloads bit for bit", "-", lambda v: "yes" if v.reloads else "NO"),
    ]
    return [[what, own, *(of(v) for v in results.variants)] for what, own, of in spec]


def write_page(results: "Results", path: Path) -> None:
    page.write(path, html(results))


def html(results: "Results") -> str:
    """The whole report."""
    names = " and ".join(v.name for v in results.variants)
    machine = results.hardware
    lead = (
        f"A sentence encoder ({results.model}) quantized by qtk {__version__} with "
        f"{results.sizes.calibration} unlabelled sentences, and measured beside the float32 model "
        f"on {machine['cpu']}, {machine['threads']} "
        f"thread{'s' if machine['threads'] != 1 else ''}, torch {machine['torch']}."
    )
    sections = [
        page.tiles(_headlines(results)),
        page.section("The figures", page.table(["", "float32", *_names(results)], rows(results))),
        page.section(
            "Where the error arises", page.figure(_errors(results), _errors_caption(results)),
            page.folded("Every linear layer", _layers(results)),
        ),
        *_ranges(results),
        page.section("Bytes and milliseconds", page.side_by_side(*_costs(results))),
        page.section("How it was measured", *map(page.paragraph, _method(results))),
    ]  # fmt: skip
    return page.page(f"{results.model} in {names}", page.escape(lead), sections)


def _headlines(results: "Results") -> list[tuple[str, str]]:
    found = [
        (f"{v.fidelity.cosine:.4f}", f"mean cosine of {v.name} to float embeddings")
        for v in results.variants
    ]
    smallest = min(results.variants, key=lambda v: v.summary.bytes)
    ratio = smallest.summary.float_bytes / smallest.summary.bytes
    found.append((f"{ratio:.1f}x", f"smaller linear layers in {smallest.name}"))
    shape, seconds = next(iter(results.times.items()))
    fastest = min(results.variants, key=lambda v: v.times[shape])
    found.append(
        (f"{seconds / fastest.times[shape]:.1f}x", f"the speed of float in {fastest.name}")
    )
    return found


def _errors(results: "Results") -> str:
    series = {v.name: [layer.sqnr for layer in v.summary.layers] for v in results.variants}
    return plots.layer_errors(series, KINDS)


def _errors_caption(results: "Results") -> str:
    parts = []
    for v in results.variants:
        known = [layer for layer in v.summary.layers if layer.sqnr is not None]
        worst = min(known, key=lambda layer: layer.sqnr or 0.0)
        parts.append(f"{v.name} is lowest at {worst.name} with {worst.sqnr:.1f} dB")
    return (
        "Signal to quantization noise of what every linear layer computes, on the calibration "
        "sentences, the errors of all layers before it included. Higher is better; 20 dB is an "
        f"error of one tenth of the signal, 40 dB of one hundredth. {'; '.join(parts)}."
    )


def _layers(results: "Results") -> str:
    head = ["layer", "float32 kB"]
    for v in results.variants:
        head += [f"{v.name} kB", f"{v.name} dB", f"{v.name} kernel"]
    lines = []
    for layers in zip(*(v.summary.layers for v in results.variants), strict=True):
        line = [layers[0].name, f"{layers[0].float_bytes / 1e3:.1f}"]
        for layer in layers:
            quality = "-" if layer.sqnr is None else f"{layer.sqnr:.1f}"
            line += [f"{layer.bytes / 1e3:.1f}", quality, layer.kernel]
        lines.append(line)
    return page.table(head, lines)


def _ranges(results: "Results") -> list[str]:
    found = results.ranges
    if found is None:
        return []
    panels = {f"as it comes: spans {_span(found.before):.1f}": found.before}
    for name, after in found.after.items():
        done = f" after {found.change[name]}" if found.change[name] else ""
        panels[f"{name}{done}: {_span(after):.1f}"] = after
    widths = found.before[1] - found.before[0]
    caption = (
        f"What the LayerNorm before {found.site} hands on, channel by channel, over the evaluation "
        f"sentences: from the smallest to the largest value of each. The widest channel spans "
        f"{float(widths.max()):.1f} where the median channel spans {float(widths.median()):.2f}, "
        "so a grid that covers it leaves few steps to the others. The quantizer changes the "
        "variable first, as the titles say; weights and bias take the change back exactly."
    )
    drawing = plots.channel_ranges(panels)
    return [page.section("What the quantizer does to outliers", page.figure(drawing, caption))]


def _span(ranges: Any) -> float:
    return float(ranges[1].max() - ranges[0].min())


def _costs(results: "Results") -> tuple[str, str]:
    first = results.variants[0].summary
    sizes = {
        "linear layers": {
            "float32": first.float_bytes / 1e6,
            **{v.name: v.summary.bytes / 1e6 for v in results.variants},
        },
        "whole file": {
            "float32": results.file_bytes / 1e6,
            **{v.name: v.file_bytes / 1e6 for v in results.variants},
        },
    }
    times = {
        _words(shape): {
            "float32": 1e3 * seconds,
            **{v.name: 1e3 * v.times[shape] for v in results.variants},
        }
        for shape, seconds in results.times.items()
    }
    return (
        page.figure(plots.bars(sizes, "MB", "smaller", "larger"), (
            "Bytes of the weights. The embeddings stay in floating point, which is why a whole "
            "file shrinks less than its linear layers."
        )),
        page.figure(plots.bars(times, "ms", "faster", "slower"), (
            "Median time of one forward pass on this machine, the models taking turns"
            f"{_in_floats(results)}. CPUs multiply no 4-bit integers: 4-bit codes save memory, and "
            "run as 8-bit ones; a rotation, where there is one, takes time of its own."
        )),
    )  # fmt: skip


def _in_floats(results: "Results") -> str:
    """Which models the CPU has no integer products for."""
    floats = [v.name for v in results.variants if _computes_in(v) == "float32"]
    others = [v.name for v in results.variants if _computes_in(v) == "integers"]
    if not (floats and others):
        return ""
    return (
        f". This CPU computes {' and '.join(floats)} in float32, because its integer products are "
        f"exact only where an operand has 7 bits or fewer, and {' and '.join(others)} in integers"
    )


def _method(results: "Results") -> list[str]:
    sizes = results.sizes
    recipes = "; ".join(
        f"{v.name}: method {r['method']}, rounding {r['rounding']}, ranges {r['ranges']}"
        for v in results.variants
        for r in [v.summary.recipe]
    )
    texts = [
        f"All linear layers of the transformer blocks are quantized, activations with one scale a "
        f"tensor ({recipes}). Embeddings, LayerNorms, softmax and pooler stay in floating point. "
        "An embedding is the mean of the last hidden states over the real tokens, of length one.",
        f"Cosines, SQNR and nearest neighbours: {sizes.evaluation} sentences that are none of the "
        f"{sizes.calibration} calibration sentences, all put together from templates. They are "
        "plainer than real text.",
        "Times: after three rounds of warm-up, every model runs once in each round; medians of "
        "the rounds. Other programs on the machine disturb them.",
        "Reloading: a new process loads the saved folder, and its outputs are compared with those "
        "of the model in memory, bit for bit.",
        f"The whole demo took {results.seconds:.0f} seconds.",
    ]
    if results.spearman is not None:
        texts.insert(2, (
            "STS-B: the rank correlation, times 100, of the cosines of the test pairs with what "
            "people said of them."
        ))  # fmt: skip
    return texts


def _computes_in(variant: "Variant") -> str:
    """ "integers" or "float32", by the kernels that run; both where layers differ"""
    kinds = {
        "float32" if "float32" in layer.kernel or layer.kernel == "reference" else "integers"
        for layer in variant.summary.layers
    }
    return " and ".join(sorted(kinds))


def _words(shape: str) -> str:
    """ "16x128" -> "16 sequences of 128 tokens" """
    B, T = shape.split("x")
    return f"{B} sequence{'s' if B != '1' else ''} of {T} tokens"


def _names(results: "Results") -> list[str]:
    return [v.name for v in results.variants]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _speed(shape: str, seconds: float) -> Callable[[Any], str]:
    return lambda v: f"{1e3 * v.times[shape]:.1f} ({seconds / v.times[shape]:.2f}x)"
