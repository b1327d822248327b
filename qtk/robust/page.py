"""Studies of one float model and several quantized ones as HTML, Markdown and JSON."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from qtk import integrity, table
from qtk.errors import SchemeError
from qtk.report import page
from qtk.robust.findings import Finding, findings
from qtk.robust.result import NOISES, Robustness
from qtk.table import finite

OVERVIEW = ["model", "clean", "worst case", "corruptions", "system noise", "checks"]
FOUND = ["claim of RobustMQ", "here", "figures"]
TITLE = "Robustness"
LEAD = (
    "The same attacks, corruptions and noises on the float model and on what was quantized from "
    "it; per cent that is right, and points of difference."
)
Where = str | os.PathLike[str]


def write_report(studies: Mapping[str, Robustness], folder: Where) -> list[Path]:
    """Writes report.html, report.md and report.json, each whole or not at all.

    Args:
        studies: by the name of the quantized model, one row each of the overview.

    Raises:
        SchemeError: there is none.
    """
    if not studies:
        raise SchemeError("a report needs one study at least")
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    files = [out / f"report.{ending}" for ending in ("html", "md", "json")]
    page.write(files[0], html(studies))
    integrity.write_text(files[1], markdown(studies))
    facts = {"models": {name: study.to_dict() for name, study in studies.items()},
             "findings": [vars(finding) for finding in findings(studies)]}  # fmt: skip
    integrity.write_text(files[2], json.dumps(finite(facts), indent=1))
    return files


def html(studies: Mapping[str, Robustness]) -> str:
    """The page."""
    sections = [
        page.section("Bit widths", page.table(OVERVIEW, overview(studies))),
        page.section(
            "What RobustMQ found, here",
            page.table(FOUND, [told(f) for f in findings(studies)]),
            page.paragraph(
                "RobustMQ speaks of networks trained in few bits; these were quantized after "
                "training. A difference below the floor of two calibration seeds does not count."
            ),
        ),
    ]
    for name, study in studies.items():
        sections.append(page.section(name, study.html()))
    return page.page(TITLE, LEAD, sections)


def markdown(studies: Mapping[str, Robustness]) -> str:
    """The same tables, without the rows of single attacks."""
    lines = [f"# {TITLE}", "", LEAD, "", *table.markdown(OVERVIEW, overview(studies)), ""]
    lines += table.markdown(FOUND, [told(finding) for finding in findings(studies)])
    for name, study in studies.items():
        lines += ["", f"## {name}", "", study.markdown()]
    return "\n".join(lines).rstrip() + "\n"


def overview(studies: Mapping[str, Robustness]) -> list[list[str]]:
    """A row a model, the float one first; worst cases level by level."""
    first = next(iter(studies.values()))
    return [
        ["float", *_figures(first, "float"), "-"],
        *([name, *_figures(study, "quantized"), _verdict(study)]
          for name, study in studies.items()),
    ]  # fmt: skip


def _figures(study: Robustness, side: str) -> list[str]:
    clean = f"{100 * getattr(study.row('clean'), f'accuracy_{side}'):.1f}"
    worst = [
        f"{100 * getattr(row, f'accuracy_{side}'):.1f} ({row.level})"
        for row in study.rows if row.kind == "worst"
    ]  # fmt: skip
    summary = study.summary()
    drops = [
        f"{-100 * summary[kind][f'drop_{side}']:+.1f}" if kind in summary else "-"
        for kind in NOISES[:2]
    ]
    return [clean, ", ".join(worst) or "-", *drops]


def _verdict(study: Robustness) -> str:
    if not study.checks:
        return "-"
    return "passed" if study.is_conclusive else "no conclusion"


def told(finding: Finding) -> list[str]:
    """The columns of FOUND."""
    marks = {True: "holds", False: "does not hold", None: "open"}
    return [finding.claim, marks[finding.holds], finding.told]
