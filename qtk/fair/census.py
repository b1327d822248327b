"""A census that never was: 73,728 possible rows, a bias that was planted, and a formula for it.

Seven features; sex decides through the terms `SEX` and, for the married, `SEX_MARRIED`. As the
probability of label 1 is known for each row, so is every discriminatory one: an oracle.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qtk.fair.rows import Columns

NAMES = ("age", "edu", "marital", "occ", "hours", "race", "sex")
SIZES = (8, 8, 4, 6, 6, 4, 2)
COLUMNS = Columns(NAMES, SIZES, {})
SEX, SEX_MARRIED = 0.25, 0.45
Table = NDArray[np.int64]


def draw(n: int, seed: int = 0) -> tuple[Table, NDArray[np.int64]]:
    """Values [n, 7] and labels [n] in {0, 1}."""
    rng = np.random.default_rng(seed)
    age = _cut(np.floor(rng.normal(3.5, 1.8, n)), 8)
    sex = rng.integers(0, 2, n)
    edu = _cut(np.floor(rng.normal(3.5, 1.5, n) + 0.15 * (age - 3)), 8)
    married = rng.random(n) < 0.15 + 0.08 * age
    marital = np.where(married, 1, rng.integers(0, 4, n))
    occ = _cut(np.floor(0.6 * edu + rng.normal(0, 1.2, n)), 6)
    hours = _cut(np.floor(2.5 + 0.5 * sex + rng.normal(0, 1.2, n)), 6)
    race = rng.choice(4, n, p=(0.75, 0.12, 0.08, 0.05))
    values = np.stack([age, edu, marital, occ, hours, race, sex], 1)
    return values, (rng.random(n) < probability(values)).astype(np.int64)


def probability(values: Table) -> NDArray[np.float64]:
    """Of label 1, for rows [N, 7]: sigmoid of a score."""
    age, edu, marital, occ, hours, race, sex = values.T
    married = marital == 1
    score = (
        0.35 * (age - 3.5) - 0.08 * (age - 4.0) ** 2 + 0.55 * (edu - 3.5) + 0.9 * married
        + 0.35 * (occ - 2.5) + 0.4 * (hours - 2.5) - 0.3 * (race > 0)
        + SEX_MARRIED * sex * married + SEX * sex - 1.2
    )  # fmt: skip
    return 1 / (1 + np.exp(-score))


def split(
    n: int = 12_000, test: int = 4_000, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token rows and labels to train on, and others to test on."""
    values, labels = draw(n + test, seed)
    rows, known = COLUMNS.encode(values), torch.from_numpy(labels)
    return rows[:n], known[:n], rows[n:], known[n:]


def _cut(values: NDArray[np.floating], size: int) -> Table:
    return np.clip(values, 0, size - 1).astype(np.int64)
