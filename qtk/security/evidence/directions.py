"""Do weights crowd against the edges of the cells that they are rounded from?

Whoever freezes the codes and then trains the float weights (PQBackdoor) confines them to the cells
of those codes, and training presses many against the edges: w / scale - floor(w / scale) is just
below or above 1/2. Trained innocently, weights do not know where the edges are.

The attacker's grid need not be ours: the usual ones are tried, and the most telling counts.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from qtk.security.evidence import Evidence, Suspect
from qtk.security.minmax import layers_of

NEAR, WINDOW = 2e-3, 2e-2  # of a step, from the edge
THRESHOLD = 8.0  # standard deviations; chance gives 4 once in 30,000 times, and grids are 24
BITS = (4, 8)


def weigh(suspect: Suspect) -> Evidence:
    """How many more weights lie within `NEAR` of an edge than a tenth of those within `WINDOW`."""
    found: dict[str, Tensor] = {}
    for layer in layers_of(suspect.model).values():
        rows = layer.weight.detach().flatten(1).double()
        for name, place in _places(rows):
            inside = place[place.abs() < WINDOW]
            found[name] = torch.cat([found[name], inside]) if name in found else inside
    scores = {name: _score(inside) for name, inside in found.items()}
    worst = max(scores, key=scores.__getitem__)
    counts = torch.histc(found[worst].float(), 40, -WINDOW, WINDOW)
    return Evidence(
        "directions", scores[worst], THRESHOLD,
        f"weights within {NEAR} steps of a tie between two codes are {scores[worst]:.1f} standard "
        f"deviations more than chance leaves there, on the grid {worst}",
        {"weights by distance from the tie": counts.tolist()},
    )  # fmt: skip


def _places(rows: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Where weights [N, K] lie between two codes, 0 for the tie, on each of the usual grids."""
    for bits in BITS:
        half = 2 ** (bits - 1)
        for per in ("channel", "tensor"):
            axis = {"channel": 1}.get(per)
            largest = rows.abs().amax() if axis is None else rows.abs().amax(1, keepdim=True)
            lo = rows.amin() if axis is None else rows.amin(1, keepdim=True)
            hi = rows.amax() if axis is None else rows.amax(1, keepdim=True)
            scales = {f"/ {levels:g}": largest / levels for levels in (half - 1, half - 0.5, half)}
            scales["of both ends"] = (hi - lo) / (2 * half - 1)
            free = rows.abs() < largest * (1 - 1e-6)  # where the others lie, these decide
            for name, scale in scales.items():
                units = (rows / scale.clamp(min=1e-30))[free]
                yield f"of {bits} bits, {name}, per {per}", units - units.floor() - 0.5


def _score(inside: Tensor) -> float:
    n, share = len(inside), NEAR / WINDOW
    if n < 50:
        return 0.0
    near = int((inside.abs() < NEAR).sum())
    return (near - n * share) / (n * share * (1 - share)) ** 0.5
