"""A saved model takes the place of another as a whole: old or new, never some files of each.

Names such as config.json and tokenizer.json are fixed, and no operating system renames several
files at once. So a save is written beside the old model, brought to the disk, and then declared
whole by one rename; from there on it will be what the folder holds. Moving its files into place is
redone by whoever comes next, should the process end in between: `qtk.load`, or another save. Until
the last file is there the folder has no config.json, and nobody takes it for a model.

    .saving-x/   being written; what a killed process left of it, the next save removes
    .saved/      whole; `settle` moves it into place
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from qtk import integrity
from qtk.errors import CheckpointError

WRITING, WHOLE, GOING = ".saving-", ".saved", "going.json"
CONFIG = Path("config.json")
PICKLES = ("pytorch_model*.bin", "pytorch_model*.bin.index.json")  # a loader might prefer these

Names = Callable[[Path], Sequence[Path]]


@contextmanager
def replacing(target: Path, leaving: Names = lambda _: ()) -> Iterator[Path]:
    """A folder to write a model into; it replaces what `target` holds when the block ends well.

    Of what is there the old model's weights go, and nothing else but what `leaving` names.

    Args:
        leaving: the files of `target` that belong to the old model, beside its weights.

    Raises:
        CheckpointError: the folder cannot be made.
    """
    is_new = not target.exists()
    try:
        target.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot make the folder {str(target)!r}: {error}") from None
    with _alone(target):
        _move(target)
        for left in target.glob(f"{WRITING}*"):
            integrity.remove(left)
        work = Path(tempfile.mkdtemp(prefix=WRITING, dir=target))
        try:
            yield work
            _declare_whole(work, target, leaving)
            _move(target)
        finally:
            integrity.remove(work)
            if is_new and not any(target.iterdir()):
                target.rmdir()


def settle(target: Path) -> None:
    """Finishes a save whose process ended before all files were in place.

    Raises:
        CheckpointError: there is one, and the folder cannot be written to.
    """
    if not (target / WHOLE).is_dir():
        return
    try:
        with _alone(target):
            _move(target)
    except OSError as error:
        raise CheckpointError(
            f"{target}: a save was interrupted, and cannot be finished here ({error}); make the "
            "folder writable"
        ) from None


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time, where the system has locks of this kind."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _declare_whole(work: Path, target: Path, leaving: Names) -> None:
    """From here on the new model is what the folder holds."""
    new = _files(work)
    for name in new:
        for parent in list((target / name).parents)[: len(name.parts) - 1]:
            if parent.is_symlink():
                raise CheckpointError(f"{parent} is a link: remove it, or save into another folder")
    old = {path.relative_to(target) for path in (*_weights(target), *leaving(target))}
    going = sorted(name.as_posix() for name in old.difference(new))
    integrity.write_text(work / GOING, json.dumps(going))
    work.chmod(target.stat().st_mode & 0o777)
    integrity.sync_tree(work)
    os.replace(work, target / WHOLE)
    integrity.sync(target)


def _move(target: Path) -> None:
    """Puts the files of a whole save in place; may be ended and begun again at any point."""
    whole = target / WHOLE
    if not whole.is_dir() or whole.is_symlink():
        return
    names = _files(whole)
    if CONFIG in names:  # else only the tidying up is left
        (target / CONFIG).unlink(missing_ok=True)
        for old in _going(whole / GOING):
            (target / old).unlink(missing_ok=True)
        integrity.sync(target)
        for name in names:
            if name not in (CONFIG, Path(GOING)):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(whole / name, target / name)
        for folder in {(target / name).parent for name in names}:
            integrity.sync(folder)
        os.replace(whole / CONFIG, target / CONFIG)
        integrity.sync(target)
    integrity.remove(whole)


def _files(folder: Path) -> list[Path]:
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def _going(listed: Path) -> list[PurePosixPath]:
    """The names that a save removes; none that leads out of its folder."""
    try:
        names = [PurePosixPath(name) for name in json.loads(listed.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        return []
    return [name for name in names if not name.is_absolute() and ".." not in name.parts]


def _weights(target: Path) -> list[Path]:
    """Files of weights that were saved in the folder before: what an index names, and model*."""
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
    pickles = [path for pattern in PICKLES for path in target.glob(pattern)]
    return [*indices, *shards, *target.glob("model*.safetensors"), *pickles]
