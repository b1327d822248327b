"""qtk.trust_page: results of several studies on one page, as HTML, Markdown or JSON."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from qtk import integrity
from qtk.errors import SchemeError
from qtk.report import page
from qtk.table import finite

TITLE = "Can the quantized model be trusted as the float one was?"
LEAD = (
    "The same questions to both models, with the same inputs and seeds: what rounding changed, in "
    "either direction."
)
ENDINGS = (".html", ".md", ".json")


class Result(Protocol):
    """What a study returns."""

    @property
    def title(self) -> str:
        """What it is about, two or three words."""
        ...

    def html(self) -> str:
        """Tables, pictures and remarks, without the title."""
        ...

    def markdown(self) -> str:
        """The same, without pictures."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """The same as numbers."""
        ...


def trust_page(
    results: Result | Sequence[Result] | Mapping[str, Result], file: str | os.PathLike[str]
) -> None:
    """Writes a section for each result, whole or not at all.

    Args:
        results: of `qtk.robustness`, `fairness`, `steal`, `audit`, `xray` or `naturalness`: one,
            several, or by the titles that their sections get.
        file: .html is one page without scripts and with all pictures in it, .md has the same tables
            as Markdown, .json the numbers.

    Raises:
        SchemeError: no result, or another kind of file.
    """
    path, named = Path(file), _named(results)
    if not named or path.suffix not in ENDINGS:
        raise SchemeError(
            f"trust_page writes results to a file that ends in {', '.join(ENDINGS)}, not "
            f"{len(named)} of them to {path.name}"
        )
    if path.suffix == ".html":
        sections = [page.section(name, result.html()) for name, result in named.items()]
        page.write(path, page.page(TITLE, LEAD, sections))
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        told = {name: result.to_dict() for name, result in named.items()}
        integrity.write_text(path, json.dumps(finite(told), indent=1, allow_nan=False))
        return
    parts = [f"## {name}\n\n{result.markdown().strip()}\n" for name, result in named.items()]
    integrity.write_text(path, "\n".join([f"# {TITLE}\n\n{LEAD}\n", *parts]))


def _named(results: Result | Sequence[Result] | Mapping[str, Result]) -> dict[str, Result]:
    """By title; those of one title are counted."""
    if isinstance(results, Mapping):
        return dict(results)
    found: dict[str, Result] = {}
    for result in results if isinstance(results, Sequence) else [results]:
        alike = sum(result.title == other.title for other in found.values())
        found[f"{result.title} {alike + 1}" if alike else result.title] = result
    return found
