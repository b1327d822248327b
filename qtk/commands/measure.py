"""Commands that measure: what a quantized model costs, what bits would, many at once."""

from pathlib import Path
from typing import Annotated, Any

import typer

import qtk
from qtk.commands.options import (
    AsJson,
    Backend,
    BatchSize,
    Calib,
    Device,
    Float,
    Model,
    Preset,
    Quantized,
    Schemes,
    Seed,
    Skip,
    Timings,
    Tokenizer,
    scheme_pairs,
)
from qtk.commands.shown import errors, load, moved, print_json, show


def evaluate(
    float_model: Float,
    quantized: Quantized,
    data: Annotated[Path, typer.Option(help="Text file or folder of images.")],
    tokenizer: Tokenizer = None,
    device: Device = None,
    samples: Annotated[int | None, typer.Option(help="Drawn from the data; all if none.")] = None,
    stride: Annotated[
        int | None, typer.Option(help="Perplexity of the whole text, in windows so far apart.")
    ] = None,
    window: Annotated[int | None, typer.Option(help="Tokens of a window.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure how far QUANTIZED is from FLOAT on some data."""
    qmodel = moved(qtk.load(quantized), None, device)
    with errors.status("comparing"):
        result = qtk.evaluate(
            load(float_model, None, device), qmodel, data, tokenizer, samples=samples,
            stride=stride, window=window,
        )  # fmt: skip
    show(result, as_json)


def info(model: Quantized, as_json: AsJson = False) -> None:
    """List the layers of a quantized model: scheme, kernel, bytes, error."""
    show(qtk.summary(qtk.load(model)), as_json)


def search(
    model: Model,
    budget: Annotated[
        list[str],
        typer.Option(help="'0.8x latency', '0.5x bytes', 'cosine 0.99', 'drop 0.5 %'; repeatable."),
    ],
    calib: Calib = None,
    preset: Preset = None,
    tokenizer: Tokenizer = None,
    device: Device = None,
    scheme: Schemes = None,
    skip: Skip = None,
    batch_size: BatchSize = 16,
    verify: Annotated[int, typer.Option(help="Points of the front to measure as well.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="SVG of the front to write.")] = None,
    latencies: Timings = None,
    resume: Annotated[Path | None, typer.Option(help="Folder of losses to go on from.")] = None,
    backend: Annotated[Backend, typer.Option()] = Backend.auto,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Choose bits for MODEL under a budget: what answers lose and what layers take, measured."""
    found = qtk.search(
        load(model, None, device), budget, calib, tokenizer, schemes=scheme_pairs(scheme),
        verify=verify or True, batch_size=batch_size, latencies=latencies, resume=resume,
        backend=backend.value, seed=seed, progress=not as_json, preset=preset, skip=skip,
    )  # fmt: skip
    if plot is not None:
        found.plot(plot)
    show(found, as_json)


def bench_ops(
    model: Model,
    calib: Calib = None,
    preset: Preset = None,
    tokenizer: Tokenizer = None,
    device: Device = None,
    scheme: Schemes = None,
    batch_size: BatchSize = 16,
    latencies: Timings = None,
    backend: Annotated[Backend, typer.Option()] = Backend.auto,
    as_json: AsJson = False,
) -> None:
    """Time MODEL's operations on this device at every scheme, as they would really run."""
    found = qtk.bench_ops(
        load(model, None, device), calib, tokenizer, schemes=scheme_pairs(scheme),
        batch_size=batch_size, latencies=latencies, backend=backend.value, progress=not as_json,
        preset=preset,
    )  # fmt: skip
    show(found, as_json)


def sweep(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="TOML: models and schemes.")],
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("sweep-out"),
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Of a Ray cluster, or local.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Quantize and measure schemes x models of CONFIG; run again, it goes on where it was."""
    from qtk.sweep import engine, page, plan, table

    def say(row: dict[str, Any]) -> None:
        told = row["error"] or f"{row['sqnr'] or float('inf'):.2f} dB, {row['ms']:.2f} ms"
        errors.print(f"{row['model']} {row['scheme']}: {told}", markup=False, highlight=False)

    rows = engine.run(plan.read(config), out / "cells", ray, say)
    files = [str(file) for file in table.write(rows, out)]
    page.write_page(rows, out / "report.html")
    if as_json:
        print_json({"rows": rows, "files": files, "report": str(out / "report.html")})
    else:
        typer.echo(f"{len(rows)} cells: {', '.join(files)}; {out / 'report.html'} shows them")
