"""`save_pretrained` of quantized models, and of models that are not to be saved."""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from qtk import integrity
from qtk.errors import CheckpointError, ModelError
from qtk.integrations import networks
from qtk.integrations.card import NAME, card, may_write
from qtk.integrations.companions import companions, copy_companions
from qtk.integrations.folder import CONFIG_SUM, config_sum
from qtk.integrations.hub import Upload
from qtk.integrations.replacement import replacing
from qtk.packages.bundle import stale, weights_sum
from qtk.packages.served import bundle_of


class AtomicSave:
    """`save_pretrained` of a quantized model: the folder holds the old or the new one, whole.

    Beside what transformers writes there is a model card, unless somebody else's README.md is
    there, and a checksum of every tensor and of the config.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        save(self.model, save_directory, **kwargs)


class Unfinished:
    """`save_pretrained` of a model that is being quantized, or whose quantizing ended early."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        raise ModelError(
            "quantizing this model ended before it was done: some of its layers are integers, "
            "others are not, and it cannot be saved; load the floating-point model again"
        )


def save(
    model: Any, folder: object, sources: Sequence[str | Path] = (), **kwargs: Any
) -> list[str]:
    """Saves a quantized model, with the tokenizer and its like, as one change of the folder.

    Args:
        sources: folders or hub names whose tokenizer, image processor and pooling come along, the
            last one's where several have a file; those of an older model in the folder go.
        kwargs: as `save_pretrained` of transformers takes them.

    Returns:
        The names of the files that came along.

    Raises:
        CheckpointError: not a folder, or one that cannot be written to.
        ModelError: as `copy_companions`.
    """
    target = folder_to_save(folder)
    record = getattr(model, "qtk_record", None)  # of a plain network
    if record is not None and kwargs:
        raise CheckpointError(f"a plain network is saved without {', '.join(kwargs)}")
    upload = Upload.taken_from(kwargs, target)
    old, packages, sums = partial(_old_companions, is_known=bool(sources)), bundle_of(model), [""]
    try:
        with replacing(target, lambda place: [*old(place), *stale(place, sums[0])]) as work:
            if record is None:
                type(model).save_pretrained(model, work, **kwargs)
            else:
                networks.write(model, work, record)
            copied = {name for source in sources for name in copy_companions(source, work)}
            seal(work)
            sums[0] = weights_sum(work)
            if packages is not None:
                packages.write(work, sums[0])
            if may_write(target):
                made = record or model.config.quantization_config.record
                write_card(work, type(model).__name__, made, plain=record is not None)
            names = [p.relative_to(work).as_posix() for p in work.rglob("*") if p.is_file()]
    except SafetensorError as error:
        raise CheckpointError(f"{target} cannot be written: {error}") from error
    if upload:
        upload(target, sorted({*names, NAME}))  # somebody else's card goes up too
    return sorted(copied)


def folder_to_save(given: object) -> Path:
    """Where to save into.

    Raises:
        CheckpointError: not a path, or one that leads through a file.
    """
    if not isinstance(given, (str, os.PathLike)) or not os.fspath(given):
        raise CheckpointError(f"{given!r} is no folder to save into; '.' is the current one")
    target = Path(given)
    for part in (target, *target.parents):
        if part.is_file():
            raise CheckpointError(f"{part} is a file; give a folder to save into")
    return target


def seal(work: Path) -> None:
    """Gives the tensors of a folder, and its config.json, their checksums."""
    config = json.loads((work / "config.json").read_text(encoding="utf-8"))
    for file in sorted(work.glob("*.safetensors")):
        integrity.write(file, load_file(file), {"format": "pt", CONFIG_SUM: config_sum(config)})


def write_card(work: Path, cls: str, record: Any, plain: bool = False) -> None:
    stored = sum(file.stat().st_size for file in work.glob("*.safetensors"))
    integrity.write_text(work / NAME, card(cls, record, stored, plain))


def _old_companions(target: Path, is_known: bool) -> list[Path]:
    """What an older model brought along; left alone where the new one brings nothing."""
    if is_known:
        with suppress(ModelError):
            return [target / name for name in companions(target)]
    return []
