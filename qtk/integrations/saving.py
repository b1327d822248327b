"""`save_pretrained` of quantized models, and of models that are not to be saved."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from qtk.errors import CheckpointError, ModelError


class AtomicSave:
    """`save_pretrained` of a quantized model: what was there stays whole until all is written."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        target = _folder(save_directory)
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", target.resolve().name)
        is_new = not target.exists()
        try:
            target.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot make the folder {str(target)!r}: {error}") from None
        work = Path(tempfile.mkdtemp(prefix=".saving-", dir=target))
        try:
            type(self.model).save_pretrained(self.model, work, **kwargs)
            _put_in_place(work, target)
        except SafetensorError as error:
            raise CheckpointError(f"{target} cannot be written: {error}") from error
        finally:
            shutil.rmtree(work, ignore_errors=True)
            if is_new and not any(target.iterdir()):
                target.rmdir()


class Unfinished:
    """`save_pretrained` of a model that is being quantized, or whose quantizing ended early."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        raise ModelError(
            "quantizing this model ended before it was done: some of its layers are integers, "
            "others are not, and it cannot be saved; load the floating-point model again"
        )


def _folder(given: object) -> Path:
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


def _put_in_place(work: Path, target: Path) -> None:
    """Moves finished files into a folder, which is no checkpoint until the last one is there.

    The weights that were there go, and nothing else: what the old index names, and model*.
    """
    new = sorted(work.iterdir(), key=lambda path: path.name == "config.json")
    (target / "config.json").unlink(missing_ok=True)
    for old in _old_weights(target):
        old.unlink(missing_ok=True)
    for path in new:
        os.replace(path, target / path.name)


def _old_weights(target: Path) -> list[Path]:
    """Files of a checkpoint that was saved in the folder before."""
    indices = list(target.glob("model*.safetensors.index*.json"))
    named: set[str] = set()
    for index in indices:
        try:
            places = json.loads(index.read_text(encoding="utf-8")).get("weight_map")
            named |= {
                n for n in places.values() if n == Path(n).name and n.endswith(".safetensors")
            }
        except (OSError, ValueError, AttributeError, TypeError, RecursionError):
            continue  # not an index that a checkpoint could be read by
    shards = [target / name for name in named if (target / name).is_file()]
    return [*indices, *shards, *target.glob("model*.safetensors")]
