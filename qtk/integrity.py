"""Files that are whole or not there, and tensors that are known to be what was written.

A .safetensors file of ours says in its metadata what every tensor's SHA-256 is; a checksum finds
accidents, not attackers. What is written is on the disk before it gets its name.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qtk.errors import CheckpointError

SUMS = "qtk.sha256"  # the key of the metadata: JSON, {tensor's name: checksum}
UNREADABLE = (SafetensorError, OSError, ValueError, TypeError)


def digest(*facts: object) -> str:
    """SHA-256 of values that JSON knows, whatever the order of their keys."""
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def checksum(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes."""
    held = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    found = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    found.update(held.numpy().data)
    return found.hexdigest()


def fingerprint(model: nn.Module) -> str:
    """Of the tensors that a model answers with."""
    held = model.state_dict().items()
    return digest({name: checksum(t) for name, t in held if isinstance(t, Tensor)})


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a .safetensors file with checksums: whole and on the disk, or not at all.

    Args:
        metadata: what else stands in its header.
    """
    part = path.with_name(f"{path.name}.part")
    sums = {name: checksum(tensor) for name, tensor in tensors.items()}
    save_file(dict(tensors), part, metadata={**metadata, SUMS: json.dumps(sums)})
    _sort_metadata(part)
    part.chmod(0o666 & ~_umask())  # safetensors makes it the owner's alone
    put(part, path)


def write_text(path: Path, text: str) -> None:
    """Writes a text file, likewise."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    put(part, path)


def put(part: Path, path: Path) -> None:
    """Gives a finished file its name, once it is on the disk."""
    sync(part)
    os.replace(part, path)
    sync(path.parent)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file that `write` wrote, checked.

    Raises:
        CheckpointError: it cannot be read, has no checksums, or a tensor is not what was written.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
            sums = json.loads(metadata[SUMS])
    except (*UNREADABLE, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read, truncated perhaps: {error}") from None
    _compare(path, {name: checksum(tensor) for name, tensor in tensors.items()}, sums)
    return tensors, metadata


def verify(files: Sequence[Path]) -> dict[str, str]:
    """Compares the tensors of a checkpoint with their checksums, one at a time.

    Returns:
        The files' metadata together, but for the checksums. A file without any, of an older qtk or
        of somebody else's program, is not compared.

    Raises:
        CheckpointError: a file cannot be read, or a tensor is not what was written; with its name.
    """
    found: dict[str, str] = {}
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                metadata = dict(file.metadata() or {})
                sums = json.loads(metadata.pop(SUMS, "null"))
                found |= metadata
                if sums is not None:
                    names = file.keys()
                    _compare(path, {n: checksum(file.get_tensor(n)) for n in names}, sums)
        except UNREADABLE as error:
            raise CheckpointError(f"{path} cannot be read, truncated perhaps: {error}") from None
    return found


def sums(path: Path) -> dict[str, str] | None:
    """The checksums in a file's header; None where it has none.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        with safe_open(path, "pt") as file:
            found: dict[str, str] | None = json.loads((file.metadata() or {}).get(SUMS, "null"))
            return found
    except UNREADABLE as error:
        raise CheckpointError(f"{path} cannot be read, truncated perhaps: {error}") from None


def _compare(path: Path, found: dict[str, str], wanted: object) -> None:
    if not isinstance(wanted, dict):
        raise CheckpointError(f"{path}: its checksums are a {type(wanted).__name__}, not an object")
    for name in sorted({*found, *wanted}):
        if found.get(name) != wanted.get(name):
            what = "is not what was saved" if name in found and name in wanted else "is missing"
            if name not in wanted:
                what = "is not one of those that were saved"
            raise CheckpointError(
                f"{path}: {name} {what} (checksums differ): copy the file again from where it came"
            )


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """`sync` of a folder and all that is in it."""
    for path in (*folder.rglob("*"), folder):
        if not path.is_symlink():
            sync(path)


def remove(folder: Path) -> None:
    """Deletes a folder that is ours; what cannot be deleted stays."""
    shutil.rmtree(folder, ignore_errors=True)


def _sort_metadata(path: Path) -> None:
    """Puts the header's metadata in order, in place: safetensors writes it in a random one."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(text) <= size, "the header is longer in order"
        file.seek(8)
        file.write(text.ljust(size))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
