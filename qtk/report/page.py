"""One self-contained HTML page: no script, nothing fetched, light or dark as the system is."""

import os
import tempfile
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path


def page(title: str, lead: str, sections: Sequence[str]) -> str:
    """The whole document; `lead` and `sections` are HTML."""
    style = files("qtk.report").joinpath("page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        f"<header>\n<h1>{escape(title)}</h1>\n<p>{lead}</p>\n</header>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Text in the first column, figures to the right in the others."""
    first = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        f'<div class="wide"><table>\n<thead><tr>{first}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def figure(svg: str, caption: str) -> str:
    """A drawing and the sentence that says what one sees in it."""
    return (
        f'<figure>\n<div class="wide">{svg}</div>\n'
        f"<figcaption>{escape(caption)}</figcaption>\n</figure>"
    )


def side_by_side(*parts: str) -> str:
    return '<div class="pair">\n' + "\n".join(parts) + "\n</div>"


def folded(summary: str, content: str) -> str:
    """Content that opens at a click."""
    return f"<details>\n<summary>{escape(summary)}</summary>\n{content}\n</details>"


def tiles(values: Sequence[tuple[str, str]]) -> str:
    """Large figures, each with the few words that it stands for."""
    cells = "".join(
        f"<div><b>{escape(value)}</b><span>{escape(what)}</span></div>" for value, what in values
    )
    return f'<div class="tiles">{cells}</div>'


def write(path: str | Path, text: str) -> None:
    """Writes a whole file or none."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, work = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(work).chmod(0o644)
        os.replace(work, path)
    except BaseException:
        Path(work).unlink(missing_ok=True)
        raise
