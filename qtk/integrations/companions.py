"""The files that belong beside a model's weights: tokenizer, image processor, pooling.

A model's folder may come from anybody. No link leads the copy out of it, but for the blobs that a
hub's cache keeps beside its snapshots; and none in the target is written through.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from qtk.errors import ModelError

PATTERNS = (
    "tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "spiece.model", "sentencepiece*.model", "chat_template*", "*processor_config.json",
    "modules.json", "sentence_*config.json", "config_sentence_transformers.json",
)  # fmt: skip
MODULES = "[0-9]*_*/*"  # what sentence-transformers calls the folders that modules.json names


def copy_companions(source: str | Path, target: str | Path) -> list[str]:
    """Copies what is there of these files, so that the target folder is complete.

    Args:
        source: the folder of the float model, or its hub name.
        target: an existing folder.

    Returns:
        The names copied.

    Raises:
        ModelError: a hub name whose files cannot be fetched, a modules.json that cannot be read,
            or a name or link that leads out of one of the folders. Nothing is copied then.
    """
    folder, target = _folder(source), Path(target)
    names = companions(folder)
    for name in names:
        _check(folder, name, target)
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).unlink(missing_ok=True)
        shutil.copyfile(folder / name, target / name)
    return [str(name) for name in names]


def companions(folder: Path) -> list[Path]:
    """The names of these files in a folder, relative to it.

    Raises:
        ModelError: as `copy_companions`.
    """
    return sorted(set(_names(folder)))


def _names(folder: Path) -> Iterator[Path]:
    """The files to copy, relative to the model's folder."""
    for pattern in PATTERNS:
        yield from (file.relative_to(folder) for file in folder.glob(pattern) if file.is_file())
    for path in _module_folders(folder):
        files = (file for file in path.rglob("*") if file.is_file() or file.is_symlink())
        yield from (file.relative_to(folder) for file in files)


def _module_folders(folder: Path) -> list[Path]:
    """The folders of a sentence-transformers model's modules, without that of the model itself."""
    file = folder / "modules.json"
    if not file.is_file():
        return []
    try:
        modules = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(modules, list):
            raise TypeError(f"it holds a {type(modules).__name__}")
        paths = [module["path"] for module in modules]
        folders = [folder / path for path in paths if path]
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{file} is no list of modules with their paths ({error})") from None
    for path in folders:
        inside = path.resolve().is_relative_to(folder.resolve())
        if not inside or path.resolve() == folder.resolve():
            raise ModelError(f"{file} names {path}, which lies outside the model's folders")
    return folders


def _check(folder: Path, name: Path, target: Path) -> None:
    """Raises ModelError where a link leads out of the model, or another folder into the target."""
    home = folder.resolve()
    blobs = home.parents[1] / "blobs" if len(home.parents) > 1 else home
    found = (folder / name).resolve()
    cached = home.parent.name == "snapshots" and found.is_relative_to(blobs)
    if not (found.is_relative_to(home) or cached) or not found.is_file():
        raise ModelError(
            f"{folder / name} is a link that leads out of the model's folder, or to no file"
        )
    for parent in (target / name).parents:
        if parent == target:
            break
        if parent.is_symlink():
            raise ModelError(f"{parent} is a link: remove it, or give another folder to save into")


def _folder(source: str | Path) -> Path:
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=[*PATTERNS, MODULES]))
    except Exception as error:
        raise ModelError(f"cannot fetch the tokenizer of {str(source)!r}: {error}") from error
