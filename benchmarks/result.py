"""A result file: a table, with the hardware, versions and commit that it was measured with."""

import json
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import qtk

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CODE = ("qtk", "kernels", "benchmarks", ":!benchmarks/results", ":!*.md")  # what figures depend on
Row = list[str]


def commit_of(tree: Path) -> str:
    """The commit of a tree, "-dirty" where its code differs from it; "unknown" without git."""

    def git(*command: str) -> str:
        done = subprocess.run(["git", *command], cwd=tree, capture_output=True, text=True)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != tree:
            return "unknown"
        dirty = "-dirty" if git("status", "--porcelain", "--", *CODE) else ""
        return git("rev-parse", "--short", "HEAD") + dirty
    except OSError:  # there is no git
        return "unknown"


COMMIT = commit_of(ROOT)  # of the code that this process has loaded, not of what a run ends with


def result(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Row],
    notes: str,
    *,
    hardware: str | None = None,
    versions: dict[str, str] | None = None,
    kept: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A table that `readme_tables` shows.

    Args:
        title: what was measured.
        columns: heads of the columns.
        rows: a list of cells each, as they are to be shown.
        notes: how it was measured.
        hardware: None is this CPU.
        versions: None is those of qtk, torch and transformers.
        kept: an earlier result of which rows stay: what it was measured with is named, too.
    """
    if versions is None:
        versions = versions_of("qtk", "torch", "transformers")
    commit = COMMIT
    if kept:
        earlier = kept.get("versions", {})
        versions = {name: _both(earlier.get(name), found) for name, found in versions.items()}
        commit = _both(kept.get("commit", "unknown"), commit)
    return {
        "title": title,
        "hardware": cpu_name() if hardware is None else hardware,
        "versions": versions,
        "commit": commit,
        "columns": list(columns),
        "rows": list(rows),
        "notes": notes,
    }


def _both(earlier: str | None, now: str) -> str:
    """ "a and b" with c -> "a and b and c" """
    return " and ".join(sorted({*(earlier.split(" and ") if earlier else ()), now}))


def write(name: str, found: dict[str, Any], folder: Path = RESULTS) -> None:
    """Writes a result to `<name>.json`."""
    folder.mkdir(exist_ok=True)
    text = json.dumps(found, indent=1, ensure_ascii=False)
    (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def read(name: str, folder: Path = RESULTS) -> dict[str, Any]:
    """What `<name>.json` holds, nothing where there is no such file."""
    path = folder / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def cpu_name() -> str:
    """The processor, how many threads are used, and its units for int8 products."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    flags = [n for n in ("vnni", "amx_tile") if getattr(torch.cpu, f"_is_{n}_supported", bool)()]
    return f"{name}, {torch.get_num_threads()} threads, {' '.join(flags) or 'no int8 instructions'}"


def versions_of(*packages: str) -> dict[str, str]:
    """The versions of those that are installed; qtk's own is that of the tree."""
    found = {}
    for name in packages:
        try:
            found[name] = qtk.__version__ if name == "qtk" else version(name)
        except PackageNotFoundError:
            continue
    return found
