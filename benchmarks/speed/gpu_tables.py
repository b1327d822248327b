"""From measured rows to tables and roofline plots. Needs no GPU: tests feed it made-up rows.

    python -m benchmarks.speed.gpu_tables          the plots of benchmarks/results/gpu_kernels_*.csv

A row is a dict: kernel, shape ("MxNxK" or "MxK"), us, bytes, ops, the roofs of its own run
(roof_bytes, roof_ops, per microsecond), first_call_s, the commit, and <peer>_us for every peer that
ran. One that could not be measured has an error instead, and fatal where its process ended by it.
"""

import csv
import sys
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.result import COMMIT, RESULTS, result, write
from benchmarks.speed.gpu_device import file_of

Row = dict[str, Any]
DERIVED = ("GB/s", "TOPS", "of_ceiling", "bound")
TEXTS = {"kernel", "shape", "bound", "commit", "error", "fatal"}
TEXTS |= {"device", "driver", "torch", "triton"}


def measured_rows(rows: list[Row]) -> list[Row]:
    """Without those that failed."""
    return [row for row in rows if "us" in row]


def settled(rows: list[Row]) -> list[Row]:
    """What another run leaves as it is: times, and errors of this very code or of a lost device."""
    same = COMMIT != "unknown"
    return [
        row for row in rows
        if "us" in row or row.get("fatal") or (same and row.get("commit") == COMMIT)
    ]  # fmt: skip


def derived(row: Row) -> Row:
    """The row with its rates, and the share of the nearer roof that it reaches."""
    if "us" not in row:
        return row
    memory = row["bytes"] / row["roof_bytes"]
    compute = row["ops"] / row["roof_ops"] if row["ops"] else 0.0
    return {
        **row, "GB/s": round(row["bytes"] / row["us"] / 1e3, 1),
        "TOPS": round(row["ops"] / row["us"] / 1e6, 2),
        "of_ceiling": round(max(memory, compute) / row["us"], 3),
        "bound": "compute" if compute > memory else "memory",
    }  # fmt: skip


def peers_of(row: Row) -> dict[str, float]:
    """Microseconds of every peer that ran."""
    return {
        name.removesuffix("_us"): float(value)
        for name, value in row.items()
        if name.endswith("_us") and value not in ("", None)
    }


def summary(rows: list[Row], head: dict[str, Any]) -> dict[str, Any]:
    """A line per kernel and number of rows: shares of the roof, and speed over each peer."""
    failed = len(rows) - len(measured_rows(rows))
    rows = measured_rows(rows)
    names = list(dict.fromkeys(name for row in rows for name in peers_of(row)))
    lines = []
    for kernel, M in dict.fromkeys((row["kernel"], rows_in(row)) for row in rows):
        mine = [row for row in rows if (row["kernel"], rows_in(row)) == (kernel, M)]
        shares = [derived(row)["of_ceiling"] for row in mine]
        over = [
            [peers_of(row)[name] / row["us"] for row in mine if name in peers_of(row)]
            for name in names
        ]
        lines.append([
            kernel, str(M), str(len(mine)), spread([row["first_call_s"] for row in mine], "{:.2f}"),
            spread(shares, "{:.2f}"), *(spread(ratios, "{:.2f}x") for ratios in over),
        ])  # fmt: skip
    over_peers = (f"over {name}" for name in names)
    return result(
        "Kernels on a GPU: share of the measured roof, and speed over peers",
        ["kernel", "rows", "shapes", "first call, s", "of roof", *over_peers],
        lines,
        "least / median / most over the shapes of BERT, ViT and OPT; roofs (copy, library "
        "product of 8192) and peers are of the same run; every row is in the csv beside this"
        + (f", {failed} that failed too" if failed else ""),
        kept=commits_of(rows),
        **head,
    )


def slower(rows: list[Row], head: dict[str, Any]) -> dict[str, Any]:
    """The shapes where a peer is faster, the worst first."""
    rows = measured_rows(rows)
    found = [
        (row["us"] / us, row, name, us)
        for row in rows for name, us in peers_of(row).items() if us < row["us"]
    ]  # fmt: skip
    found.sort(key=lambda item: -item[0])
    return result(
        "Shapes where a peer is faster",
        ["kernel", "shape", "us", "peer", "its us", "slower by"],
        [
            [row["kernel"], row["shape"], f"{row['us']:.2f}", name, f"{us:.2f}", f"{ratio:.2f}x"]
            for ratio, row, name, us in found
        ],
        f"{len({(r['kernel'], r['shape']) for _, r, _, _ in found})} of {len(rows)} "
        "kernels and shapes have such a peer",
        kept=commits_of(rows),
        **head,
    )


def commits_of(rows: list[Row]) -> dict[str, Any]:
    """Which commits measured the rows, as `result` takes it."""
    return {"commit": " and ".join(sorted({row.get("commit", "unknown") for row in rows}))}


def spread(values: list[float], how: str) -> str:
    if not values:
        return ""
    shown = [how.format(value) for value in (min(values), median(values), max(values))]
    return shown[0] if len(values) == 1 else " / ".join(shown)


def rows_in(row: Row) -> int:
    return int(row["shape"].split("x")[0])


def write_tables(rows: list[Row], run: dict[str, str], head: dict[str, Any], folder: Path) -> None:
    """The csv of a device and its two tables."""
    write_csv(rows, folder / f"{file_of('gpu_kernels', run)}.csv")
    write(file_of("gpu_kernels", run), summary(rows, head), folder)
    write(file_of("gpu_slower", run), slower(rows, head), folder)


def write_csv(rows: list[Row], path: Path) -> None:
    full = [derived(row) for row in rows]
    names = list(dict.fromkeys(key for row in full for key in row))
    whole = path.with_suffix(".tmp")
    with whole.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(full)
    whole.replace(path)


def read_csv(path: Path, run: dict[str, str]) -> list[Row]:
    """Rows of an earlier run on the same device with the same versions."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        {k: v if k in TEXTS else float(v) for k, v in row.items() if v and k not in DERIVED}
        for row in rows
        if all(row.get(key) == value for key, value in run.items())
    ]


def plot(rows: list[Row], path: Path) -> bool:
    """Operations per byte against the rate, below the measured roofs."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    products = [derived(row) for row in measured_rows(rows) if row["ops"]]
    figure, axes = plt.subplots(figsize=(7, 5))
    for name in dict.fromkeys(row["kernel"] for row in products):
        mine = [row for row in products if row["kernel"] == name]
        intensity = [row["ops"] / row["bytes"] for row in mine]
        axes.loglog(intensity, [row["TOPS"] for row in mine], "o", label=name, markersize=3)
    x = [2.0**i for i in range(-1, 13)]
    for memory, compute in sorted({(row["roof_bytes"], row["roof_ops"]) for row in products}):
        axes.loglog(x, [min(i * memory, compute) / 1e6 for i in x], "k-", linewidth=0.5)
    axes.set_xlabel("operations per byte")
    axes.set_ylabel("TOPS")
    if products:
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)
    return True


def main() -> int:
    for path in sorted(RESULTS.glob("gpu_kernels_*.csv")):
        if not plot(read_csv(path, {}), path.with_suffix(".png")):
            print("plots need matplotlib: pip install 'qtk-torch[plots]'")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
