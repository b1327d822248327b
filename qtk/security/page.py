"""An audit as one HTML file: the verdict, the evidences, and the figures behind them."""

from pathlib import Path

from qtk.report import page
from qtk.report.plots import columns
from qtk.security.audit import BLIND, Audit

HEAD = ["evidence", "number", "threshold", "speaks for a backdoor"]


def write_page(found: Audit, file: str | Path, name: str = "a model") -> None:
    """Writes the page, whole or not at all."""
    rows = [
        [e.name, f"{e.number:.2f}", f"{e.threshold:.2f}", "yes" if e.speaks else "no"]
        for e in found.evidences
    ]
    parts = [page.section("Evidences", page.table(HEAD, rows))]
    for e in found.evidences:
        parts.append(page.section(e.name, page.figure(columns(e.shown), f"{e.sentence}.")))
    told = f"{found.samples} inputs, random patches or tokens included; seed {found.seed}. {BLIND}"
    parts.append(page.section("What this is worth", page.paragraph(told)))
    lead = f"{Path(name).name}: {found.verdict}."
    page.write(file, page.page("Audit", lead, parts))
