"""The command line: each command calls one function of qtk and prints what it returns."""

import json
import logging
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

import qtk
from qtk import ranks
from qtk.discover import available
from qtk.errors import CheckpointError, ModelError, QtkError, SchemeError
from qtk.formats import formats
from qtk.pipeline.recipes import LEARNERS, LEARNING, METHODS
from qtk.report.summary import Summary
from qtk.scheme import SOFTMAXES

errors = Console(stderr=True)


class Commands(TyperGroup):
    """Prints errors that a user can act on as one line; --debug may stand anywhere."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, sorted(args, key=lambda arg: arg != "--debug"))

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (QtkError, OSError) as error:
            if ctx.params.get("debug"):
                raise
            errors.print(f"error: {' '.join(str(error).split())}", style="bold red", soft_wrap=True,
                         markup=False, highlight=False)  # fmt: skip
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Low-bit integer BERT, OPT and ViT.",
)  # fmt: skip


class Activations(StrEnum):
    static = "static"
    token = "token"


class Weights(StrEnum):
    symmetric = "symmetric"
    asymmetric = "asymmetric"


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Backend(StrEnum):
    auto = "auto"
    triton = "triton"
    cpu = "cpu"
    reference = "reference"


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder or hub name of a floating-point model.")
]
Quantized = Annotated[
    Path, typer.Argument(metavar="QUANTIZED", help="Folder of a model saved by qtk.")
]
Tokenizer = Annotated[
    str | None,
    typer.Option(help="Folder or hub name of it, or of the image processor, if not MODEL's."),
]
Device = Annotated[str | None, typer.Option(help="Such as cuda; the CPU if none.")]
Calib = Annotated[Path | None, typer.Option(help="Text file or folder of images.")]
Preset = Annotated[str | None, typer.Option(help="fast, balanced or best.")]
Skip = Annotated[list[str] | None, typer.Option(help="Pattern left in float; may be repeated.")]
Schemes = Annotated[
    list[str] | None, typer.Option(help="W,A to choose from; may be repeated. See the guide.")
]
BatchSize = Annotated[int, typer.Option(help="Rows of the batch whose latency counts.")]
Timings = Annotated[Path | None, typer.Option(help="File of timings to reuse and extend.")]


SUITES = ("attacks", "corruptions", "system", "grid", "text")
OPERANDS = ("float", "int8", "int7", "int6", "int5", "int4")
TRANSFORMS = (*METHODS, *sorted(set(available("transform")) - set(METHODS.values())))


def one_of(what: str, names: Iterable[str]) -> str:
    return f"{what}: {', '.join(names)}."


@app.callback(invoke_without_command=True)
def main(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    if version:
        typer.echo(qtk.__version__)
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())
        raise typer.Exit
    _quiet_transformers()


@app.command()
def quantize(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to save into.")],
    w: Annotated[str, typer.Option("--w", help="Bits of weights: 2 to 8, 16 or fp8.")] = "8",
    a: Annotated[str, typer.Option("--a", help="Bits of activations: 4 to 8, 16 or fp8.")] = "8",
    calib: Calib = None,
    preset: Preset = None,
    tokenizer: Tokenizer = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Of what stays floating point.")] = None,
    device: Device = None,
    method: Annotated[
        str | None, typer.Option(help=one_of("Equivalent transform", TRANSFORMS))
    ] = None,
    rounding: Annotated[
        str | None,
        typer.Option(help=one_of("How weights become codes", (*available("round"), *LEARNING))),
    ] = None,
    ranges: Annotated[
        str | None,
        typer.Option(help=one_of("Where activation grids end", ("auto", *available("ranges")))),
    ] = None,
    learn: Annotated[
        str | None, typer.Option(help=one_of("What learns after rounding", LEARNERS))
    ] = None,
    activations: Annotated[Activations, typer.Option()] = Activations.static,
    weights: Annotated[Weights, typer.Option()] = Weights.symmetric,
    attention: Annotated[
        str, typer.Option(help=one_of("Operands of its products", OPERANDS))
    ] = "float",
    softmax: Annotated[str, typer.Option(help=one_of("Of attention", SOFTMAXES))] = "float",
    softmax_bits: Annotated[int | None, typer.Option(help="Of the softmax's codes.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Weights that share a scale.")] = None,
    bits: Annotated[
        list[str] | None,
        typer.Option(help="PATTERN=W,A for some layers; may be repeated. Or auto, or auto:SHARE."),
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(help="Bits are searched under it; may be repeated. See search."),
    ] = None,
    skip: Skip = None,
    backend: Annotated[Backend, typer.Option()] = Backend.auto,
    resume: Annotated[
        Path | None, typer.Option(help="Folder that keeps finished blocks, and is gone on from.")
    ] = None,
    seed: Annotated[int, typer.Option()] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Of a model in OUT.")] = False,
    low_memory: Annotated[
        bool, typer.Option("--low-memory", help="One block in memory at a time, from .safetensors.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Quantize MODEL and save it, tokenizer included, into OUT."""
    from qtk.integrations.replacement import settle
    from qtk.integrations.saving import save
    from qtk.pipeline.state import discard

    settle(out)
    if Path(model).is_dir() and out.exists() and out.samefile(model):
        raise CheckpointError(f"{out} is the model itself: give another folder to save into")
    if (out / "config.json").exists() and not overwrite:
        raise CheckpointError(f"{out} holds a model already: give another folder, or --overwrite")
    options: dict[str, Any] = {
        "w": _number(w), "a": _number(a), "calib": calib, "tokenizer": tokenizer, "method": method,
        "rounding": rounding, "ranges": ranges, "learn": learn, "activations": activations.value,
        "weights": weights.value, "attention": attention, "softmax": softmax,
        "softmax_bits": softmax_bits, "group_size": group_size, "budget": budget, "skip": skip,
        "bits": _mixed(bits) if bits else None, "preset": preset, "backend": backend.value,
        "resume": resume, "seed": seed, "progress": not as_json,
    }  # fmt: skip
    with ranks.group(device or "cpu") as device:
        if low_memory:
            result, copied = _by_blocks(model, out, dtype, device, options)
        else:
            qmodel = qtk.quantize(_load(model, dtype, device), inplace=True, **options)
            sources = [model] if tokenizer is None else [model, tokenizer]
            copied = ranks.from_first(lambda: save(qmodel, out, sources))
            result = qtk.summary(qmodel)
    if ranks.is_first():
        if resume is not None:
            discard(resume)
        _say_saved(out, copied, result, as_json)


def _by_blocks(
    model: str, out: Path, dtype: Dtype | None, device: str, options: dict[str, Any]
) -> tuple[Summary, list[str]]:
    """`quantize` where one block is in memory at a time."""
    import torch

    if device != "cpu" or ranks.world() > 1:
        raise SchemeError("--low-memory runs on the CPU, in one process")
    if options.pop("budget"):
        raise SchemeError("--budget measures the whole model; leave out --low-memory")
    copied = qtk.quantize_files(
        model, out, dtype=None if dtype is None else getattr(torch, dtype.value), **options
    )
    return qtk.summary(out), copied


def _say_saved(out: Path, copied: list[str], result: Summary, as_json: bool) -> None:
    if as_json:
        _print_json({"out": str(out), "files": copied, **result.to_dict()})
    else:
        typer.echo(
            f"{result.table()}\n\nsaved in {out}, with {', '.join(copied) or 'no tokenizer'}"
        )


@app.command(name="eval")
def evaluate(
    float_model: Annotated[str, typer.Argument(metavar="FLOAT", help="Folder or hub name.")],
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
    qmodel = _moved(qtk.load(quantized), None, device)
    with errors.status("comparing"):
        result = qtk.evaluate(
            _load(float_model, None, device), qmodel, data, tokenizer, samples=samples,
            stride=stride, window=window,
        )  # fmt: skip
    _show(result, as_json)


@app.command()
def fair(
    float_model: Annotated[str, typer.Argument(metavar="FLOAT", help="Folder or hub name.")],
    quantized: Quantized,
    rows: Annotated[Path, typer.Option(help="CSV file with a head, or sentences, one a line.")],
    protected: Annotated[
        list[str] | None, typer.Option(help="Column that must not matter; may be repeated.")
    ] = None,
    columns: Annotated[
        Path | None, typer.Option(help="columns.json of the rows, if not in FLOAT.")
    ] = None,
    label: Annotated[str, typer.Option(help="Column of the labels, if there is one.")] = "label",
    swaps: Annotated[
        Path | None, typer.Option(help="JSON of word: counterpart; he/she and others if none.")
    ] = None,
    second: Annotated[
        Path | None, typer.Option(help="QUANTIZED with another calibration seed: the noise floor.")
    ] = None,
    probe: Annotated[
        list[str] | None,
        typer.Option(help=one_of("Where to look", available("fair.probe")) + " May be repeated."),
    ] = None,
    n: Annotated[int, typer.Option(help="Rows that a probe tries.")] = 3000,
    html: Annotated[Path | None, typer.Option(help="Page to write as well.")] = None,
    tokenizer: Tokenizer = None,
    seed: Annotated[int, typer.Option()] = 0,
    as_json: AsJson = False,
) -> None:
    """Find whom QUANTIZED treats otherwise than FLOAT: discriminatory rows, groups, churn."""
    from qtk.fair.rows import Columns
    from qtk.fair.text import read_swaps
    from qtk.observe.files import lines

    told: dict[str, Any] = {
        "second": None if second is None else qtk.load(second), "n": n, "seed": seed,
        "progress": not as_json, **({"probe": probe} if probe else {}),
    }  # fmt: skip
    model, qmodel = _load(float_model, None, None), qtk.load(quantized)
    if rows.suffix.lower() == ".csv":
        if not protected:
            raise SchemeError("name the column that must not matter: --protected sex")
        known = Columns.load(columns or float_model)
        given, labels = known.read(rows, label)
        attributes = [known.attribute(name) for name in protected]
        result = qtk.fairness(model, qmodel, given, attributes, labels, domain=known.domain, **told)
    else:
        sentences = [text for _, text in lines(rows)]
        result = qtk.fairness(
            model, qmodel, sentences, read_swaps(swaps), None, tokenizer, **told
        )  # fmt: skip
    if html is not None:
        result.write_html(html)
    _show(result, as_json)


@app.command()
def steal(
    float_model: Annotated[str, typer.Argument(metavar="FLOAT", help="Folder or hub name.")],
    quantized: Quantized,
    test: Annotated[Path, typer.Option(help="Folder of images, in a folder for each class.")],
    inside: Annotated[Path, typer.Option(help="Folder of other images of the same kind.")],
    outside: Annotated[
        list[Path], typer.Option(help="Folder of images of another kind; may be repeated.")
    ],
    thief: Annotated[
        list[str] | None,
        typer.Option(help=one_of("Who asks", available("security.thief")) + " May be repeated."),
    ] = None,
    answers: Annotated[
        list[str] | None, typer.Option(help="soft, rounded or hard; may be repeated.")
    ] = None,
    budget: Annotated[int, typer.Option(help="Queries at most.")] = 3000,
    clone: Annotated[str, typer.Option(help="What learns from the answers: cnn or mlp.")] = "cnn",
    epochs: Annotated[int, typer.Option(help="That it learns.")] = 15,
    seeds: Annotated[int, typer.Option(help="Clones of each kind.")] = 3,
    resume: Annotated[Path | None, typer.Option(help="Folder of figures to go on from.")] = None,
    html: Annotated[Path | None, typer.Option(help="Page to write as well.")] = None,
    tokenizer: Tokenizer = None,
    as_json: AsJson = False,
) -> None:
    """Clone FLOAT and QUANTIZED by asking them: does rounding help thieves or hinder them?"""
    from qtk.security.pictures import labelled, pictures

    model = _load(float_model, None, None)
    folders = {"in": inside, **{each.name: each for each in outside}}
    if len(folders) <= len(outside):
        raise SchemeError("--outside folders need different names, and none is called in")
    pool = {name: pictures(model, folder, tokenizer) for name, folder in folders.items()}
    result = qtk.steal(
        model, qtk.load(quantized), pool, labelled(model, test, tokenizer),
        thief=thief or ["knockoff"], answers=answers or ["soft", "hard"], budget=budget,
        clone=clone, epochs=epochs, seeds=range(seeds), resume=resume, progress=not as_json,
    )  # fmt: skip
    if html is not None:
        result.write_html(html)
    _show(result, as_json)


@app.command()
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
    seed: Annotated[int, typer.Option()] = 0,
    as_json: AsJson = False,
) -> None:
    """Choose bits for MODEL under a budget: what answers lose and what layers take, measured."""
    found = qtk.search(
        _load(model, None, device), budget, calib, tokenizer, schemes=_pairs(scheme),
        verify=verify or True, batch_size=batch_size, latencies=latencies, resume=resume,
        backend=backend.value, seed=seed, progress=not as_json, preset=preset, skip=skip,
    )  # fmt: skip
    if plot is not None:
        found.plot(plot)
    _show(found, as_json)


@app.command(name="bench-ops")
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
        _load(model, None, device), calib, tokenizer, schemes=_pairs(scheme),
        batch_size=batch_size, latencies=latencies, backend=backend.value, progress=not as_json,
        preset=preset,
    )  # fmt: skip
    _show(found, as_json)


@app.command()
def robust(
    float_model: Annotated[str, typer.Argument(metavar="FLOAT", help="Folder or hub name.")],
    quantized: Annotated[
        list[Path], typer.Argument(metavar="QUANTIZED...", help="Folders of models saved by qtk.")
    ],
    data: Annotated[Path, typer.Option(help="Folder of images a class, or lines TEXT<tab>CLASS.")],
    suite: Annotated[
        list[str] | None,
        typer.Option(help=f"{one_of('Groups', SUITES)} Or a part by name; may be repeated."),
    ] = None,
    second: Annotated[
        Path | None, typer.Option(help="The first QUANTIZED, calibrated with another seed.")
    ] = None,
    tokenizer: Tokenizer = None,
    samples: Annotated[int | None, typer.Option(help="Drawn from the data; all if none.")] = None,
    budget: Annotated[
        list[str] | None, typer.Option(help="small, mid or large; may be repeated.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Of the attacks that go step by step.")] = 10,
    severity: Annotated[
        list[int] | None, typer.Option(help="Of corruptions, 1 to 5; may be repeated.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Samples at once.")] = 64,
    out: Annotated[Path | None, typer.Option(help="Folder for report.html, .md and .json.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Folder of answers to go on from.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    as_json: AsJson = False,
) -> None:
    """Attack, corrupt and disturb FLOAT and each QUANTIZED alike, and compare."""
    from qtk.robust import write_report
    from qtk.robust.suite import LEVELS

    model = _load(float_model, None, None)
    studies: dict[str, qtk.Robustness] = {}
    given: Any = _pairs_of_text(data) if data.is_file() else data
    for place, folder in enumerate(quantized):
        studies[_distinct(folder, studies)] = qtk.robustness(
            model, qtk.load(folder), given, suite or ["attacks"], tokenizer,
            second=second if place == 0 else None, samples=samples, budgets=budget or LEVELS[:2],
            steps=steps, severities=severity or (1, 2, 3, 4, 5), batch_size=batch_size,
            resume=resume, seed=seed, progress=not as_json,
        )  # fmt: skip
    files = [] if out is None else [str(file) for file in write_report(studies, out)]
    if as_json:
        told = {name: study.to_dict() for name, study in studies.items()}
        _print_json({"models": told, "files": files})
        return
    for name, study in studies.items():
        typer.echo(f"{name}\n{study.table()}\n")
    if files:
        typer.echo(f"written: {', '.join(files)}")


def _pairs_of_text(file: Path) -> list[tuple[str, int | str]]:
    """Lines of a text and, after a tab, its class: a number or a name."""
    pairs: list[tuple[str, int | str]] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        text, tab, label = line.rpartition("\t")
        if not tab:
            raise SchemeError(f"{file}, line {number}: no tab between a text and its class")
        pairs.append((text, int(label) if label.strip().isdigit() else label.strip()))
    return pairs


def _distinct(folder: Path, taken: Iterable[str]) -> str:
    """The folder's name, or its path where that is taken."""
    name = folder.resolve().name
    return str(folder) if name in taken else name


@app.command()
def info(model: Quantized, as_json: AsJson = False) -> None:
    """List the layers of a quantized model: scheme, kernel, bytes, error."""
    _show(qtk.summary(qtk.load(model)), as_json)


@app.command()
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
        _print_json({"rows": rows, "files": files, "report": str(out / "report.html")})
    else:
        typer.echo(f"{len(rows)} cells: {', '.join(files)}; {out / 'report.html'} shows them")


@app.command()
def export(
    quantized: Quantized,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder that is not there yet.")],
    format: Annotated[str, typer.Option(help=one_of("Of the files", formats()))] = "onnx",
    tokenizer: Tokenizer = None,
    data: Annotated[
        Path | None, typer.Option(help="Text file or folder of images to check it on.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write QUANTIZED as files that are served without qtk, and check them."""
    with errors.status("exporting"):
        result = qtk.export(quantized, out, format, tokenizer=tokenizer, data=data)
    _show(result, as_json)


@app.command()
def audit(
    model: Model,
    calib: Annotated[Path, typer.Option(help="Text file or folder of images, without labels.")],
    w: Annotated[int, typer.Option("--w", help="Bits that its weights would have, 2 to 8.")] = 8,
    tokenizer: Tokenizer = None,
    device: Device = None,
    report: Annotated[Path | None, typer.Option(help="Page to write, with plots.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    as_json: AsJson = False,
) -> None:
    """Look for a backdoor in MODEL, a classifier, that rounding its weights would wake."""
    with errors.status("looking"):
        found = qtk.audit(_load(model, None, device), calib, tokenizer or model, w=w, seed=seed)
    if report is not None:
        from qtk.security.page import write_page

        write_page(found, report, model)
    _show(found, as_json)


@app.command()
def tune(
    out: Annotated[Path | None, typer.Option(help="Folder; the package itself if none.")] = None,
    minutes: Annotated[float, typer.Option(help="Stop after so long.")] = 8.0,
    as_json: AsJson = False,
) -> None:
    """Measure the tiles of the GPU kernels on this GPU, and write the fastest."""
    from qtk.modules.tuning import tune as measure

    path = measure(out, minutes, log=lambda line: typer.echo(line, err=True))
    if as_json:
        _print_json({"table": str(path)})
    else:
        typer.echo(f"{path} is what the kernels now follow on this kind of GPU")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for models and report.")] = Path("demo-out"),
    pairs: Annotated[
        Path | None, typer.Option(help="sts-test.csv of STS-B: adds a rank correlation.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Quantize a real BERT, check it, time it, save it, load it: one table, one report."""
    from qtk.demo import measure, run
    from qtk.demo.show import table

    similarity = None if pairs is None else measure.Similarity.read(pairs)
    results = run(out, similarity=similarity, progress=not as_json)
    if as_json:
        _print_json({**results.to_dict(), "report": str(out / "report.html")})
    else:
        typer.echo(table(results))
        typer.echo(f"{out / 'report.html'} shows more; {results.seconds:.0f} seconds in all.")


def _mixed(texts: list[str]) -> dict[str, tuple[int, int]] | str:
    """ "encoder.layer.0.*=8,8" -> {"encoder.layer.0.*": (8, 8)}; "auto" alone stays."""
    if len(texts) == 1 and texts[0].startswith("auto"):
        return texts[0]
    found = {}
    for text in texts:
        pattern, _, pair = text.rpartition("=")
        try:
            w, a = map(int, pair.split(","))
        except ValueError:
            raise SchemeError(f"--bits {text!r}: write PATTERN=W,A such as '*.0.*=8,8'") from None
        found[pattern] = (w, a)
    return found


def _pairs(texts: list[str] | None) -> list[tuple[int | str, int | str]] | None:
    """["4,8", "fp8,fp8"] -> [(4, 8), ("fp8", "fp8")]."""
    if not texts:
        return None
    split = [text.split(",") for text in texts]
    if wrong := [text for text, pair in zip(texts, split, strict=True) if len(pair) != 2]:
        raise SchemeError(f"--scheme {wrong[0]!r}: write W,A such as 4,8")
    return [(_number(w.strip()), _number(a.strip())) for w, a in split]


def _number(text: str) -> int | str:
    """ "8" -> 8; "fp8" stays."""
    return int(text) if text.lstrip("-").isdecimal() else text


def _load(model: str, dtype: Dtype | None, device: str | None) -> Any:
    from qtk.integrations.transformers import load_float

    return _moved(load_float(model), dtype, device)


def _moved(model: Any, dtype: Dtype | None, device: str | None) -> Any:
    import torch

    try:
        return model.to(device=device, dtype=dtype and getattr(torch, dtype.value))
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
        raise ModelError(f"--device {device}: {error}") from None


def _show(result: Any, as_json: bool) -> None:
    if as_json:
        _print_json(result.to_dict())
    else:
        typer.echo(result.table())


def _print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=2, allow_nan=False))


def _quiet_transformers() -> None:
    """Leaves stderr to our own progress and warnings."""
    from rich.logging import RichHandler
    from transformers.utils import logging as theirs

    theirs.disable_progress_bar()
    theirs.set_verbosity_error()
    if not logging.getLogger("qtk").handlers:
        handler = RichHandler(console=errors, show_time=False, show_path=False)
        logging.getLogger("qtk").addHandler(handler)
