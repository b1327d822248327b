"""The one table of README.md: qtk beside its best peers, put together from three results."""

from typing import Any

Result = dict[str, Any]
SOURCES = ("fidelity_peers", "cpu_minilm", "sizes")
SIZE = "16x128"  # sentences and tokens each
OURS = {  # contender and bits
    "qtk W8A8": "W8A8", "qtk W8A8, qtk.compile": "W8A8", "qtk W8A8 file in OpenVINO": "W8A8",
    "qtk W4A8": "W4A8", "qtk W4A4": "W4A4",
}  # fmt: skip
TIMED = {  # contenders whose cosine was measured, too: bits, who, how
    "torchao int8 dynamic, compiled": ("W8A8", "torchao", "per token"),
    "ONNX Runtime int8 dynamic": ("W8A8", "ONNX Runtime", "dynamic"),
    "optimum-quanto int8": ("W8A8", "optimum-quanto", "static"),
    "OpenVINO int8, NNCF": ("W8A8", "OpenVINO", "NNCF, static"),
}
UNKNOWN = "-"


def headline(peers: Result, cpu: Result, sizes: Result) -> Result:
    """A result, a row a contender.

    Args:
        peers: cosines on STS-B test, `accuracy.peers`.
        cpu: milliseconds, `speed.cpu_models`.
        sizes: megabytes on disk, `accuracy.sizes`.
    """
    ms, megabytes = cpu["milliseconds"][SIZE], {row[0]: row[2] for row in sizes["rows"]}
    cosines = {tuple(row[:3]): row[4:6] for row in peers["rows"] if row[4].startswith("0.")}

    def line(name: str, key: tuple[str, ...], contender: str = "", bits: str = "") -> list[str]:
        size = megabytes.get(bits, UNKNOWN)
        return [name, *cosines[key], time_of(contender, ms), size]

    rows = [["float32", "1", "1", time_of("float32", ms), megabytes["float32"]]]
    for contender, bits in OURS.items():
        rows.append(line(contender, (bits, "qtk", "static"), contender, bits))
    best = ("W8A8", "qtk", "best, per token")
    rows.append(line('qtk W8A8, preset "best", per token', best))
    fastest = min((name for name in TIMED if name in ms), key=lambda name: ms[name])
    rows.append(line(f"fastest peer: {fastest}", TIMED[fastest], fastest))
    for bits in ("W8A8", "W4A4"):
        others = [key for key in cosines if key[0] == bits and key[1] != "qtk"]
        key = max(others, key=lambda key: float(cosines[key][0]))
        rows.append(line(f"closest peer at {bits}: {key[1]}, {key[2]}", key))
    return {
        "title": "all-MiniLM-L6-v2 on STS-B test",
        "hardware": cpu["hardware"],
        "versions": {**cpu["versions"], **releases(peers)},
        "columns": ["", "cosine", "worst", "ms, and speed over float32", "MB"],
        "rows": rows,
        "notes": "cosine to float32's embeddings, mean and worst of 2,552 sentences; 16 sentences "
        f"of 128 tokens; the file, with word embeddings in float32. {UNKNOWN}: not measured",
    }


def time_of(contender: str, ms: dict[str, float]) -> str:
    """ "80.3 (2.48x)" """
    if contender not in ms:
        return UNKNOWN
    return f"{ms[contender]:.1f} ({ms['float32'] / ms[contender]:.2f}x)"


def releases(peers: Result) -> dict[str, str]:
    """The versions of the peers that were measured."""
    return {row[1]: row[3] for row in peers["rows"] if row[1] == "llm-compressor" and "." in row[3]}
