"""Quantized models as files that other runtimes read: one file here a format.

    qtk/formats/onnx.py  is  qtk.export(qmodel, out, format="onnx")

A format is asked to write a `Source` into an empty folder, and answers what it wrote:

    def write(source: Source, folder: Path) -> Exported

It reads layers as `LinearSpec`s, refuses by name those that it has no form for, and checks what it
wrote before it returns. Files that start with _ are what several formats stand on.
"""

import os
import shutil
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from qtk.discover import available, load
from qtk.errors import CheckpointError, SchemeError
from qtk.grids import LinearSpec
from qtk.integrations import sentence_transformers
from qtk.integrations.companions import copy_companions
from qtk.integrations.transformers import load as load_quantized
from qtk.integrations.transformers import record_of
from qtk.modules.embedding import QuantEmbedding
from qtk.modules.linear import QuantLinear
from qtk.observe.batches import prepare
from qtk.table import finite, listed


@dataclass(frozen=True)
class Source:
    """What is exported.

    Attributes:
        model: a quantized model of transformers.
        tokenizer: of the model, or its folder; None for what lies beside it.
        batches: what the file is checked on; None for tokens or pixels drawn at random.
    """

    model: Any
    tokenizer: Any = None
    batches: list[dict[str, Any]] | None = None

    @property
    def linears(self) -> dict[str, LinearSpec]:
        """The quantized linears by full name."""
        found = self.model.named_modules()
        return {name: layer.spec() for name, layer in found if isinstance(layer, QuantLinear)}

    @property
    def embeddings(self) -> dict[str, QuantEmbedding]:
        """The quantized tables by full name."""
        found = self.model.named_modules()
        return {name: table for name, table in found if isinstance(table, QuantEmbedding)}


@dataclass(frozen=True)
class Exported:
    """What was written, and how it was checked.

    Attributes:
        format: its name.
        files: relative to the folder, without what came along with the model.
        checked_in: the runtime that computed the other side of the comparison.
        cosine, worst: of its outputs to the quantized model's, row by row: mean and smallest.
        largest_difference: of one number of the outputs.
        notes: what is not as it is in qtk.
        companions: tokenizer, pooling and so on.
    """

    format: str
    files: tuple[str, ...]
    checked_in: str
    cosine: float
    worst: float
    largest_difference: float
    notes: tuple[str, ...] = ()
    companions: tuple[str, ...] = ()

    def table(self) -> str:
        """Plain text."""
        rows = [
            ("files", ", ".join(self.files)),
            ("with", ", ".join(self.companions) or "no tokenizer"),
            ("checked in", self.checked_in),
            ("cosine to qtk", f"{self.cosine:.6f}, worst {self.worst:.6f}"),
            ("largest difference", f"{self.largest_difference:.3g}"),
            *(("note", note) for note in self.notes),
        ]
        return "\n".join(listed(rows))

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return finite(asdict(self))


class Format(Protocol):
    """What a file of this folder is."""

    def write(self, source: Source, folder: Path) -> Exported:
        """Writes the model into an existing, empty folder.

        Raises:
            SchemeError: a layer that the format has no form for.
            BackendError: a package that it needs is missing.
            ModelError: what was written does not compute what the model does.
        """
        ...


def export(
    model: nn.Module | str | os.PathLike[str],
    out: str | os.PathLike[str],
    format: str = "onnx",
    *,
    tokenizer: Any = None,
    data: Any = None,
) -> Exported:
    """Writes a quantized model as files that are served without qtk.

    Args:
        model: what `qtk.quantize` returned, or the folder it was saved in.
        out: a folder that is not there yet, or empty. It is complete: config, tokenizer, and what
            sentence-transformers keeps beside a model.
        format: "onnx", "openvino", "compressed-tensors", "gguf", "aoti"; a file in qtk/formats.
        tokenizer: tokenizer or processor, or the folder of one, to lie in `out`; by default what
            lies beside the model.
        data: what the file is checked on, in any form that `calib` has; by default tokens or
            pixels drawn at random.

    Raises:
        SchemeError: there is no such format, or it has no form for a layer's scheme; the message
            names the layer and the remedy.
        CheckpointError: `out` is not empty, or cannot be written.
        BackendError: the package that writes or checks the format is not installed.
        ModelError: not a quantized model, or the file does not compute what the model does.
    """
    chosen: Any = _format(format)
    target = _empty(out)
    opened, beside = _opened(model)
    record_of(opened)
    given = sentence_transformers.unwrap(model, data, tokenizer)
    batches = None if data is None else prepare(opened, given.data, given.tokenizer)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".exporting-", dir=target.parent))
    except OSError as error:
        raise CheckpointError(f"cannot write beside {str(target)!r}: {error}") from None
    try:
        work.chmod(0o755)
        written: Exported = chosen.write(Source(opened, given.tokenizer, batches), work)
        companions = _companions(model, opened, beside, tokenizer, work)
        if target.exists():
            target.rmdir()
        os.replace(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return replace(written, companions=tuple(companions))


def formats() -> dict[str, str]:
    """The file of each format."""
    return {module.replace("_", "-"): module for module in available("formats")}


def _format(name: object) -> Any:
    known = formats()
    if not isinstance(name, str) or name not in known:
        raise SchemeError(f"format={name!r}: choose {', '.join(map(repr, known))}")
    return load("formats", known[name])


def _empty(out: object) -> Path:
    if not isinstance(out, (str, os.PathLike)) or not os.fspath(out):
        raise CheckpointError(f"{out!r} is no folder to export into")
    target = Path(out).resolve()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise CheckpointError(f"{out} is not an empty folder: give one that is not there yet")
    return target


def _opened(model: Any) -> tuple[Any, Path | None]:
    """The transformers model, and the folder that what belongs to it lies in."""
    if isinstance(model, (str, os.PathLike)):
        return load_quantized(model), Path(model)
    inner = sentence_transformers.transformers_model(model)
    opened = model if inner is None else inner
    source = Path(str(getattr(getattr(opened, "config", None), "_name_or_path", "") or " "))
    return opened, source if source.is_dir() else None


def _companions(
    given: Any, opened: Any, beside: Path | None, tokenizer: Any, folder: Path
) -> list[str]:
    """Puts tokenizer, pooling and so on into the folder."""
    before = {path for path in folder.rglob("*") if path.is_file()}
    if sentence_transformers.is_wrapper(given):
        sentence_transformers.save_around(given, folder)
    elif beside is not None:
        copy_companions(beside, folder)
    if isinstance(tokenizer, (str, os.PathLike)):
        copy_companions(Path(tokenizer), folder)
    elif hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)
    after = {path for path in folder.rglob("*") if path.is_file()}
    return sorted(str(path.relative_to(folder)) for path in after - before)
