"""The README's tables, from the result files.

python benchmarks/readme_tables.py            writes them into README.md
python benchmarks/readme_tables.py --check    fails when README.md is out of date
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
KEYS = {"title", "hardware", "versions", "columns", "rows", "notes"}


def results(folder: Path) -> list[dict[str, Any]]:
    """The result files that hold a table, by name."""
    found = [json.loads(f.read_text(encoding="utf-8")) for f in sorted(folder.glob("*.json"))]
    return [result for result in found if isinstance(result, dict) and result.keys() >= KEYS]


def markdown(result: dict[str, Any]) -> str:
    """One result file as a title, a table and the line that says what it was measured with."""
    columns = [str(column) for column in result["columns"]]
    lines = [
        f"**{result['title']}**",
        "",
        _line(columns),
        _line(["---", *["---:"] * (len(columns) - 1)]),
        *(_line([str(cell) for cell in row]) for row in result["rows"]),
        "",
        f"<sub>{_words(result)}</sub>",
    ]
    return "\n".join(lines)


def insert(readme: str, folder: Path) -> str:
    """README.md with everything between the markers replaced."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    tables = "\n\n".join(map(markdown, results(folder)))
    return f"{before}{BEGIN}\n\n{tables or 'Nothing has been measured yet.'}\n\n{END}{after}"


def main(check: bool = False) -> int:
    path = ROOT / "README.md"
    old = path.read_text(encoding="utf-8")
    new = insert(old, ROOT / "benchmarks" / "results")
    if check:
        return int(old != new)
    path.write_text(new, encoding="utf-8")
    return 0


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def _words(result: dict[str, Any]) -> str:
    versions = result["versions"]
    named = ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else ""
    parts = [result["notes"], result["hardware"], named or str(versions)]
    texts = [part if isinstance(part, str) else ", ".join(map(str, part)) for part in parts]
    return " ".join(f"{text.rstrip('.')}." for text in texts if text)


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv))
