"""Ways to quantize what a GELU hands on: the input of a ViT's second MLP linear alone at 4 bits.

    python -m benchmarks.accuracy.gelu [--resume]

writes benchmarks/results/fidelity_attention_gelu.json after every figure.
"""

import argparse
from collections.abc import Callable
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from benchmarks import data
from benchmarks.accuracy.attention import IMAGES, calibration
from benchmarks.accuracy.table import Options, Table
from qtk.numerics import fake_quantize, scale_and_zero_point
from qtk.scheme import Format

Function = Callable[[Tensor], Tensor]
ENDS = [0.9**k for k in range(30)]  # of a range, as shares of the largest value


def gelu() -> Table:
    """Top-1 of the small ViT, and the error of that linear's output."""
    model = data.vit()
    pixels, labels = data.cifar10("test", IMAGES)
    base = data.accuracy(model, pixels, labels)

    def measure(options: Options, seed: int) -> list[float]:
        handles, sqnr = [], []
        for linear, x in fc2_inputs(model, calibration(seed)).items():
            grid = options["grid"](x)
            weight = linear.weight.detach()
            error = (grid(x) - x) @ weight.T
            sqnr.append(10 * float(((x @ weight.T).square().sum() / error.square().sum()).log10()))
            handles.append(linear.register_forward_pre_hook(_through(grid)))
        accuracy = data.accuracy(model, pixels, labels)
        for handle in handles:
            handle.remove()
        return [accuracy, accuracy - base, mean(sqnr)]

    cases = [
        ("asymmetric, one range", plain_range),
        ("twin ranges (PTQ4ViT)", twin_ranges),
        ("shift and scale (OS+)", shifted_range),
    ]
    return Table(
        "fidelity_attention_gelu",
        f"Small ViT, CIFAR-10 (JPEG) test, {IMAGES:,} images: GELU outputs alone at 4 bits",
        ["grid", "top-1 %", "to float", "SQNR of fc2, dB"],
        ["{:.2f}", "{:+.2f}", "{:.1f}"],
        [(name, {"grid": grid}) for name, grid in cases],
        measure,
        "Static grids per layer, the rest in floating point; ends with the smallest squared error "
        "of the grid itself",
        ["float32", f"{base:.2f}", "", ""],
    )


def _through(grid: Function) -> Callable[[Any, tuple[Tensor, ...]], tuple[Tensor]]:
    return lambda _, args: (grid(args[0]),)


@torch.no_grad()
def fc2_inputs(model: Any, batches: list[dict[str, Tensor]]) -> dict[Any, Tensor]:
    """[T, K] that the second MLP linear of every block reads."""
    seen: dict[Any, list[Tensor]] = {layer.mlp.fc2: [] for layer in model.vit.layers}
    handles = [
        linear.register_forward_pre_hook(lambda m, args: seen[m].append(args[0].flatten(0, -2)))
        for linear in seen
    ]
    for batch in batches:
        model(**batch)
    for handle in handles:
        handle.remove()
    return {linear: torch.cat(parts) for linear, parts in seen.items()}


def best(candidates: list[Function], x: Tensor) -> Function:
    return min(candidates, key=lambda f: float((f(x) - x).square().sum()))


def grid_over(lo: Tensor, hi: Tensor) -> Function:
    fmt = Format(4, symmetric=False)
    scale, zero_point = scale_and_zero_point(lo, hi, fmt)
    return lambda x: fake_quantize(x, scale, zero_point, fmt)


def plain_range(x: Tensor) -> Function:
    return best([grid_over(x.min(), x.max() * c) for c in ENDS], x)


def twin_ranges(x: Tensor) -> Function:
    """PTQ4ViT: a bit says which half, three bits the code; the negative half ends at min GELU."""
    negative = 0.16997 / 7

    def function(end: Tensor) -> Function:
        positive = end / 7
        return lambda x: torch.where(
            x < 0, (x / negative).round().clamp(-7, 0) * negative,
            (x / positive).round().clamp(0, 7) * positive,
        )  # fmt: skip

    return best([function(x.max() * c) for c in ENDS], x)


def shifted_range(x: Tensor) -> Function:
    """OS+: every channel centred, large ones scaled down to a threshold; then one range."""
    lo, hi = x.amin(0), x.amax(0)
    shift, reach = (lo + hi) / 2, (hi - lo) / 2

    def function(share: float) -> Function:
        scale = (reach / (reach.max() * share)).clamp(min=1.0)
        y = (x - shift) / scale
        grid = grid_over(y.min(), y.max())
        return lambda x: grid((x - shift) / scale) * scale + shift

    return best([function(c) for c in ENDS], x)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--resume", action="store_true", help="keep the figures in the file")
    options = parser.parse_args()
    gelu().fill(resume=options.resume)
