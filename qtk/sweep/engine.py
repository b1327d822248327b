"""All cells of a sweep, one after the other here or side by side on Ray; each is kept when done."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from qtk import integrity
from qtk.errors import BackendError, CheckpointError
from qtk.sweep.cell import measure
from qtk.sweep.plan import Cell

Row = dict[str, Any]
RETRIES = 3  # of a cell whose worker died


def run(
    cells: Sequence[Cell], folder: Path, address: str | None = None,
    say: Callable[[Row], None] = lambda row: None,
) -> list[Row]:  # fmt: skip
    """The rows of all cells, in order; what the folder holds from an earlier run is not run again.

    Args:
        address: of a Ray cluster; "local" starts one on this machine; None is this process.
        say: called with each row that is new.

    Raises:
        BackendError: Ray is not installed or not there, or a worker died over and over.
        CheckpointError: a row of an earlier run cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = {cell.key: _read(folder / f"{cell.key}.json") for cell in cells}
    left = [cell for cell in cells if found[cell.key] is None]
    rows = map(measure, left) if address is None else _on_ray(left, address)
    for new in rows:
        integrity.write_text(folder / f"{new['key']}.json", json.dumps(new, indent=1))
        found[new["key"]] = new
        say(new)
    every = (found[cell.key] for cell in cells)
    return [row for row in every if row is not None]


def _on_ray(cells: Sequence[Cell], address: str) -> Iterator[Row]:
    """The rows as they are done. A worker that dies is replaced, and its cell run again."""
    try:
        import ray
    except ImportError:
        raise BackendError("--ray needs Ray: install qtk[ray]") from None
    ours = not ray.is_initialized()
    if ours:
        try:
            ray.init(None if address == "local" else address, log_to_driver=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise BackendError(f"no Ray cluster at {address!r}: {error}") from None
    try:
        task = ray.remote(measure).options(max_retries=RETRIES, num_cpus=1)
        waiting = [task.remote(cell) for cell in cells]
        while waiting:
            done, waiting = ray.wait(waiting)
            yield ray.get(done[0])
    except ray.exceptions.RayError as error:
        raise BackendError(f"Ray gave up; run again to go on: {str(error)[:500]}") from None
    finally:
        if ours:
            ray.shutdown()


def _read(file: Path) -> Row | None:
    if not file.exists():
        return None
    try:
        row: Row = json.loads(file.read_text(encoding="utf-8"))
        return row
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}; delete it") from None
