"""All packages of a model, and the folder that keeps them beside its weights.

    compiled/<cpu and torch>/packages.json      sizes, times, signature, what they are bound to
    compiled/<cpu and torch>/plain-1x16.pt2     native code

A package runs only where it was made, or on the same kind of CPU with the same PyTorch, and only
with the weights that it was made from: it holds a copy of them.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qtk import integrity
from qtk.errors import BackendError, CheckpointError
from qtk.packages.package import Package, Signature, Size, here, key
from qtk.packages.route import PLAIN, Route, Timing

FOLDER, MANIFEST, VERSION = "compiled", "packages.json", 1
MOST_BYTES = 2**22  # of a manifest

logger = logging.getLogger("qtk")


@dataclass
class Bundle:
    """Routes by name; a model is served by them.

    Attributes:
        routes: "plain" for a call without a cache, "prefill" and "step" for calls with one.
    """

    routes: dict[str, Route]

    def names(self) -> tuple[str, ...]:
        """Of all packages: "plain-1x16"."""
        return tuple(
            f"{name}-{_shown(p.size)}"
            for name, route in self.routes.items()
            for p in route.packages
        )

    def write(self, folder: Path, weights: str) -> None:
        """Into a checkpoint's folder.

        Args:
            weights: `weights_sum` of the checkpoint.
        """
        place = folder / FOLDER / key(here())
        place.mkdir(parents=True)
        found: dict[str, Any] = {"version": VERSION, **here(), "weights": weights, "routes": {}}
        for name, route in self.routes.items():
            files = []
            for package in route.packages:
                file = place / f"{name}-{_shown(package.size)}.pt2"
                package.copy_to(file)
                files.append({"file": file.name, "size": package.size, "sha256": _sha256(file)})
            found["routes"][name] = {
                "signature": asdict(route.signature), "packages": files, "pad_id": route.pad_id,
                "timings": [asdict(timing) for timing in route.timings],
            }  # fmt: skip
        integrity.write_text(place / MANIFEST, json.dumps(found, indent=1))

    def __deepcopy__(self, memo: Any) -> "Bundle":
        return self


def read(folder: Path) -> Bundle | None:
    """The packages of a checkpoint that run here; None where there are none, which is logged.

    Raises:
        CheckpointError: the list of them cannot be read, or a file is not what was written.
    """
    kept = sorted(folder.glob(f"{FOLDER}/*/{MANIFEST}"))
    if not kept:
        logger.warning("%s has no compiled packages: qtk.compile makes them; it runs eager", folder)
        return None
    place = folder / FOLDER / key(here())
    if place / MANIFEST not in kept:
        logger.warning(
            "%s was compiled for %s, and this is %s: it runs eager; qtk.compile it here",
            folder, ", ".join(path.parent.name for path in kept), place.name,
        )  # fmt: skip
        return None
    manifest = _manifest(place / MANIFEST)
    if {name: manifest.get(name) for name in here()} != here():
        logger.warning("%s was not made on this kind of CPU: it runs eager", place)
        return None
    if not (weights := weights_sum(folder)) or manifest.get("weights") != weights:
        logger.warning("%s was compiled from other weights: it runs eager; compile it again", place)
        return None
    try:
        routes = {name: _route(place, found) for name, found in manifest["routes"].items()}
        return Bundle({PLAIN: routes.pop(PLAIN), **routes})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{place / MANIFEST} is not a list of packages: {error!r}") from None
    except BackendError as error:
        logger.warning("%s; it runs eager", error)
        return None


def has_packages(folder: Path) -> bool:
    """Whether a checkpoint comes with packages, for whichever machine."""
    return any(folder.glob(f"{FOLDER}/*/{MANIFEST}"))


def stale(folder: Path, weights: str) -> list[Path]:
    """Files of packages in a checkpoint's folder that are of other weights than `weights`."""
    found = []
    for manifest in folder.glob(f"{FOLDER}/*/{MANIFEST}"):
        try:
            is_ours = _manifest(manifest).get("weights") == weights
        except CheckpointError:
            is_ours = False
        if not is_ours:
            found += [manifest, *manifest.parent.glob("*.pt2")]
    return found


def weights_sum(folder: Path) -> str:
    """One checksum of all tensors of a checkpoint, from those in its headers; "" without any."""
    found = [integrity.sums(file) for file in sorted(folder.glob("model*.safetensors"))]
    return integrity.digest(found) if found and all(found) else ""


def _manifest(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError("too long")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict) or found.get("version") != VERSION:
        raise CheckpointError(f"{path} is not a list of packages that this qtk knows")
    return found


def _route(place: Path, found: Mapping[str, Any]) -> Route:
    signature = found["signature"]
    axes = {
        part: {name: tuple(axes) for name, axes in signature[part].items()}
        for part in ("inputs", "outputs")
    }
    packages = []
    for entry in found["packages"]:
        path = place / Path(entry["file"]).name
        if not path.is_file() or path.is_symlink() or _sha256(path) != entry["sha256"]:
            raise CheckpointError(f"{path} is not the file that was compiled: compile again")
        packages.append(Package(path, _size(entry["size"])))
    timings = [Timing(**{**timing, "size": _size(timing["size"])}) for timing in found["timings"]]
    described = Signature(axes["inputs"], axes["outputs"], dict(signature["dtypes"]),
                          str(signature["returns"]), bool(signature["caches"]))  # fmt: skip
    if any(not hasattr(torch, dtype) for dtype in described.dtypes.values()):
        raise ValueError("an input has an unknown dtype")
    return Route(described, packages, timings, int(found["pad_id"]))


def _shown(size: Size | None) -> str:
    return "any" if size is None else "x".join(str(n) for n in size if n is not None)


def _size(found: Any) -> Any:
    if found is None:
        return None
    rows, tokens = found
    return int(rows), None if tokens is None else int(tokens)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
