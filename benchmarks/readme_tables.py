"""The tables of README.md, kernels/README.md and benchmarks/results/README.md.

python -m benchmarks.readme_tables            writes them
python -m benchmarks.readme_tables --check    fails when one is out of date
"""

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.headline import SOURCES, headline

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
ON_A_GPU = ("gpu_checks", "gpu_kernels", "gpu_slower", "gpu_attention", "gpu_models")  # run_gpu.sh
NOT_MEASURED = "Speed on a GPU: **not measured**; `benchmarks/run_gpu.sh` measures it."
COMPILED = (  # one variant a kernel, of the hundreds in aot.csv
    "layer_norm_quantize w8 token K=768", "gelu_quantize w8 token K=4096",
    "hadamard_quantize w8 token K=768 block=768 (24x32)", "int8_linear M=8192 g=0",
    "int4_linear W4A8 M=8192 g=0", "int4_linear W4A4 M=256 g=128",
    "weight_only_linear W4A16 M=1 g=128 split=8", "gemv weight_only_linear W4A16 M=1 g=128",
    "fp8_linear M=8192 g=0", "int8_linear bulk M=8192 g=0", "fp8_linear bulk M=8192 g=0",
    "heads_quantize w8 K=64",
)  # fmt: skip
KEYS = {"title", "hardware", "versions", "columns", "rows", "notes"}


def results(folder: Path, names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The result files that hold a table: those named, in that order, or all by name."""
    files = [folder / f"{name}.json" for name in names] if names else sorted(folder.glob("*.json"))
    found = [json.loads(f.read_text(encoding="utf-8")) for f in files if f.exists()]
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
    """README.md with the one table between its markers replaced."""
    found = results(folder, SOURCES)
    return fill(readme, [headline(*found)] if len(found) == len(SOURCES) else [], folder)


def insert_all(page: str, folder: Path) -> str:
    """benchmarks/results/README.md, likewise."""
    return fill(page, results(folder), folder)


def fill(page: str, found: list[dict[str, Any]], folder: Path) -> str:
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    tables = list(map(markdown, found)) or ["Nothing has been measured yet."]
    if not on_a_gpu(folder):
        tables.append(NOT_MEASURED)
    text = "\n\n".join(tables)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def on_a_gpu(folder: Path) -> list[str]:
    """The tables of what GPUs measured, a file for each device."""
    files = [path.stem for name in ON_A_GPU for path in sorted(folder.glob(f"{name}*.json"))]
    return [markdown(result) for result in results(folder, files)] if files else []


def kernel_table(folder: Path) -> str:
    """What the compiler made of the kernels for sm_90, and what a GPU measured, if one did."""
    with (folder / "aot.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    found = {row["variant"]: row for row in rows if row["arch"] == "90"}
    compiled = [found[name] for name in COMPILED]
    columns = ["kernel", "registers", "spilled", "shared", "occupancy", "loop", "per element",
               "unpack", "tensor core"]  # fmt: skip
    keys = ("variant", "registers", "spill_bytes", "shared", "occupancy", "loop", "per_element",
            "unpack", "tensor_core")  # fmt: skip
    lines = [_line(columns), _line(["---", *["---:"] * 7, "---"])]
    lines += [_line([row[key] for key in keys]) for row in compiled]
    lines += [
        "",
        f"<sub>sm_90, triton {compiled[0]['triton']}. In [aot.csv](../benchmarks/results/aot.csv): "
        f"{_archs(rows)}.</sub>",
        "",
    ]
    return "\n".join([*lines, "\n\n".join(on_a_gpu(folder) or [NOT_MEASURED])])


def _archs(rows: list[dict[str, str]]) -> str:
    """How many variants were compiled for each architecture, and how many of them spill."""
    parts = []
    for arch in sorted({row["arch"] for row in rows}, key=int):
        found = [row for row in rows if row["arch"] == arch]
        spilled = sum(row["spill_bytes"] != "0" for row in found)
        parts.append(f"sm_{arch}, {len(found)} variants, {spilled or 'none'} spilled")
    return "; ".join(parts)


def attention_table(folder: Path) -> str:
    """What a score costs at head size 64, for all architectures; of other sizes what spills."""
    with (folder / "aot_attention.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    archs = sorted({row["arch"] for row in rows}, key=int)
    per_score = {(row["variant"], row["arch"]): row["per_score"] for row in rows}
    spilled = {(row["variant"], row["arch"]) for row in rows if row["spill_bytes"] != "0"}
    hopper = {row["variant"]: row for row in rows if row["arch"] == "90"}
    lines = [
        "**Attention: instructions per score, head size 64**",
        "",
        _line(["variant", *(f"sm_{arch}" for arch in archs), "registers", "tensor core (sm_90)"]),
        _line(["---", *["---:"] * len(archs), "---:", "---"]),
    ]
    for name, row in hopper.items():
        if " D=" in name:
            continue
        costs = [
            per_score.get((name, arch), "-") + (" (spills)" if (name, arch) in spilled else "")
            for arch in archs
        ]
        lines.append(_line([name, *costs, row["registers"], row["tensor_core"]]))
    return "\n".join([
        *lines, "", f"<sub>\"code4 i8 fp8\": code softmax of 4 steps, int8 q and k, e4m3 v. triton "
        f"{rows[0]['triton']}; registers on sm_90; - : the architecture has no float8. In "
        "[aot_attention.csv](../benchmarks/results/aot_attention.csv), with heads of 32, 80 and "
        f"128 channels: {_archs(rows)}.</sub>"
    ])  # fmt: skip


def main(check: bool = False) -> int:
    folder = ROOT / "benchmarks" / "results"
    pages = {
        ROOT / "README.md": insert,
        ROOT / "kernels" / "README.md": insert_kernels,
        folder / "README.md": insert_all,
    }
    stale = 0
    for path, made in pages.items():
        old = path.read_text(encoding="utf-8")
        new = made(old, folder)
        stale += old != new
        if not check:
            path.write_text(new, encoding="utf-8")
    return int(check and stale > 0)


def insert_kernels(readme: str, folder: Path) -> str:
    """kernels/README.md with everything between the markers replaced."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    tables = f"{kernel_table(folder)}\n\n{attention_table(folder)}"
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def _words(result: dict[str, Any]) -> str:
    versions = result["versions"]
    named = ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else ""
    commit = f"Commit {result['commit']}" if "commit" in result else ""
    parts = [result["notes"], result["hardware"], named or str(versions), commit]
    texts = [part if isinstance(part, str) else ", ".join(map(str, part)) for part in parts]
    return " ".join(f"{text.rstrip('.')}." for text in texts if text)


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv))
