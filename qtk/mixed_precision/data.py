"""Data in two halves: what a search sees, and what only verification does."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qtk.errors import CalibrationError, SchemeError
from qtk.mixed_precision.budget import Budget
from qtk.mixed_precision.loss import check_enough
from qtk.mixed_precision.synthetic import synthetic
from qtk.observe import Batch
from qtk.observe.batches import SAMPLES, prepare


@dataclass(frozen=True)
class Data:
    """Batches that the search sees, and those that only verification does.

    Attributes:
        given: whether they are a user's, or made up.
    """

    seen: list[Batch]
    held: list[Batch]
    given: bool

    @classmethod
    def of(
        cls, model: nn.Module, calib: Any, tokenizer: Any, seed: int, budgets: Sequence[Budget]
    ) -> "Data":
        accuracy = [budget for budget in budgets if budget.is_accuracy]
        if calib is None:
            if accuracy:
                raise SchemeError(f"budget {accuracy[0].text!r} is verified on data: give calib")
            made = synthetic(model, seed)
            return cls(made[:1], made[1:], False)
        batches = prepare(model, calib, tokenizer, seed, 2 * SAMPLES)
        seen = [part for batch in batches if (part := _every_other(batch, 0)) is not None]
        held = [part for batch in batches if (part := _every_other(batch, 1)) is not None]
        if not held:
            raise CalibrationError("half of calib is held back to verify: give two samples or more")
        for budget in accuracy:
            check_enough(budget, sum(map(_size, held)))
        return cls(seen, held, True)


def _every_other(batch: Batch, first: int) -> Batch | None:
    """Every other row, from the first or second on; None where there is none."""
    B = _size(batch)
    if first >= B:
        return None
    return {k: v[first::2] if _is_rows(v, B) else v for k, v in batch.items()}


def full_rows(batch: Batch, count: int) -> Batch:
    """So many rows, repeated where there are fewer, without padding.

    Fused blocks leave padding out and float ones compute it, so only a batch that has none takes
    a time that is the sum of its operations' times, whichever scheme each of them has.
    """
    B = _size(batch)
    index = torch.arange(count) % B
    rows = {k: v[index.to(v.device)] if _is_rows(v, B) else v for k, v in batch.items()}
    mask = rows.get("attention_mask")
    return rows if mask is None else {**rows, "attention_mask": torch.ones_like(mask)}


def first_rows(batches: Sequence[Batch], count: int) -> list[Batch]:
    """Rows of all batches alike, so many together or a few more."""
    whole = sum(map(_size, batches))
    step = max(whole // count, 1)
    cut = ({k: v[::step] if _is_rows(v, _size(b)) else v for k, v in b.items()} for b in batches)
    return list(cut)


def _size(batch: Batch) -> int:
    return len(next(v for v in batch.values() if isinstance(v, Tensor) and v.dim()))


def _is_rows(value: Any, B: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == B
