"""Commands that write models: quantize, export, demo; and tune, a table for the kernels."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

import qtk
from qtk import ranks
from qtk.commands.options import (
    AsJson,
    Backend,
    Calib,
    Device,
    Dtype,
    Model,
    Preset,
    Quantized,
    Seed,
    Skip,
    Tokenizer,
    number,
    one_of,
)
from qtk.commands.shown import errors, load, print_json, show
from qtk.discover import available
from qtk.errors import CheckpointError, SchemeError
from qtk.formats import formats
from qtk.pipeline.recipes import LEARNERS, LEARNING, METHODS
from qtk.report.summary import Summary
from qtk.scheme import SOFTMAXES

OPERANDS = ("float", "int8", "int7", "int6", "int5", "int4")
TRANSFORMS = (*METHODS, *sorted(set(available("transform")) - set(METHODS.values())))


class Activations(StrEnum):
    static = "static"
    token = "token"


class Weights(StrEnum):
    symmetric = "symmetric"
    asymmetric = "asymmetric"


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
    seed: Seed = 0,
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
        "w": number(w), "a": number(a), "calib": calib, "tokenizer": tokenizer, "method": method,
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
            qmodel = qtk.quantize(load(model, dtype, device), inplace=True, **options)
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
        print_json({"out": str(out), "files": copied, **result.to_dict()})
    else:
        typer.echo(
            f"{result.table()}\n\nsaved in {out}, with {', '.join(copied) or 'no tokenizer'}"
        )


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
    show(result, as_json)


def tune(
    out: Annotated[Path | None, typer.Option(help="Folder; the package itself if none.")] = None,
    minutes: Annotated[float, typer.Option(help="Stop after so long.")] = 8.0,
    as_json: AsJson = False,
) -> None:
    """Measure the tiles of the GPU kernels on this GPU, and write the fastest."""
    from qtk.modules.tuning import tune as measure

    path = measure(out, minutes, log=lambda line: typer.echo(line, err=True))
    if as_json:
        print_json({"table": str(path)})
    else:
        typer.echo(f"{path} is what the kernels now follow on this kind of GPU")


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
        print_json({**results.to_dict(), "report": str(out / "report.html")})
    else:
        typer.echo(table(results))
        typer.echo(f"{out / 'report.html'} shows more; {results.seconds:.0f} seconds in all.")
