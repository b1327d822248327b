"""How large MiniLM is on disk, by scheme.

    python -m benchmarks.accuracy.sizes

Sizes depend on the scheme alone, so that nothing is calibrated. Writes
benchmarks/results/sizes.json.
"""

import tempfile
from pathlib import Path
from typing import Any

import qtk
from benchmarks import data
from benchmarks.accuracy.table import quantize
from benchmarks.result import Row, result, write

QUICK: dict[str, Any] = {"activations": "token", "rounding": "nearest"}
WORDS = {"embeddings.word_embeddings": (8, 16)}
SCHEMES: dict[str, dict[str, Any]] = {
    "W8A8": {"w": 8, "a": 8},
    "W4A8": {"w": 4, "a": 8},
    "W4A4": {"w": 4, "a": 4},
    "W4A8, word embeddings in 8 bits": {"w": 4, "a": 8, "bits": WORDS},
}


def megabytes(model: Any) -> float:
    """Of the model's file."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")) / 1e6


def main() -> None:
    model, _ = data.minilm()
    rows: list[Row] = []
    for name, options in SCHEMES.items():
        qmodel = quantize(model, None, {**options, **QUICK}, 0)
        linears = [layer for layer in qtk.summary(qmodel).layers if "embeddings" not in layer.name]
        now, before = (sum(getattr(x, key) for x in linears) for key in ("bytes", "float_bytes"))
        if not rows:
            rows.append(["float32", f"{before / 1e6:.1f}", f"{megabytes(model):.1f}"])
        rows.append([name, f"{now / 1e6:.1f}", f"{megabytes(qmodel):.1f}"])
    columns = ["scheme", "linear layers, MB", "file, MB"]
    notes = (
        "weights with their scales; word embeddings in floating point unless a row says otherwise"
    )
    write("sizes", result("MiniLM on disk", columns, rows, notes))


if __name__ == "__main__":
    main()
