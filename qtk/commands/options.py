"""What several commands take, and how its text is read."""

from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from qtk.errors import SchemeError


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
Float = Annotated[str, typer.Argument(metavar="FLOAT", help="Folder or hub name.")]
Seed = Annotated[int, typer.Option()]
Page = Annotated[Path | None, typer.Option(help="Page to write as well.")]


def one_of(what: str, names: Iterable[str]) -> str:
    return f"{what}: {', '.join(names)}."


def scheme_pairs(texts: list[str] | None) -> list[tuple[int | str, int | str]] | None:
    """["4,8", "fp8,fp8"] -> [(4, 8), ("fp8", "fp8")]."""
    if not texts:
        return None
    split = [text.split(",") for text in texts]
    if wrong := [text for text, pair in zip(texts, split, strict=True) if len(pair) != 2]:
        raise SchemeError(f"--scheme {wrong[0]!r}: write W,A such as 4,8")
    return [(number(w.strip()), number(a.strip())) for w, a in split]


def number(text: str) -> int | str:
    """ "8" -> 8; "fp8" stays."""
    return int(text) if text.lstrip("-").isdecimal() else text
