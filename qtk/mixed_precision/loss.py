"""How far a model's answers are from the float model's, sample by sample, without labels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qtk.errors import CalibrationError, SchemeError
from qtk.fidelity.compare import MAX_LOGITS, logits_of, pool
from qtk.mixed_precision.budget import Budget
from qtk.models import describe
from qtk.numerics import EPS
from qtk.observe import Batch, forward

TRIES = 6  # models that one set of held-back data may judge, each bounded as surely as all must be
SURE = 2.935  # standard errors above the mean: all TRIES hold in 99 of 100 draws (Bonferroni)


@dataclass(frozen=True)
class Judge:
    """What the float model answers to some batches.

    Attributes:
        metric: "cosine" for embeddings, "kl" for predictions.
        answers: of each batch: embeddings [B, H], or logits [B, C] or [B, T, C].
    """

    batches: tuple[Batch, ...]
    answers: tuple[Tensor, ...]
    metric: str
    options: dict[str, Any]

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, batches: Sequence[Batch]) -> "Judge":
        """Of a float model; batches beyond what memory has for their logits are left out."""
        options = {"use_cache": False} if describe(model)[0].causal else {}
        kept: list[Batch] = []
        answers: list[Tensor] = []
        metric = "cosine"
        for i, batch in enumerate(batches):
            out = forward(model, batch, i, **options)
            metric = "cosine" if _predictions(out) is None else "kl"
            answer = _answer(out, batch)
            if kept and sum(map(Tensor.numel, answers)) + answer.numel() > MAX_LOGITS:
                break
            kept.append(batch)
            answers.append(answer)
        return cls(tuple(kept), tuple(answers), metric, options)

    @property
    def samples(self) -> int:
        return sum(map(len, self.answers))

    @torch.no_grad()
    def losses(self, model: nn.Module, metric: str | None = None) -> Tensor:
        """[samples] float64: 1 - cosine, KL(float || model) in nats, or the expected drop.

        The drop is the probability that the float model gives its own answer, less what it gives
        the answer of `model`: the accuracy lost, if the float model is as sure as it is right.

        Raises:
            SchemeError: the model has no such metric.
        """
        metric = metric or self.metric
        if (metric == "cosine") != (self.metric == "cosine"):
            raise SchemeError(
                f"a budget of {metric!r} does not fit {type(model).__name__}: "
                f"give {'cosine' if self.metric == 'cosine' else 'kl or drop'}"
            )
        found = [
            _losses(answer, _answer(model(**batch, **self.options), batch), batch, metric)
            for batch, answer in zip(self.batches, self.answers, strict=True)
        ]
        return torch.cat(found).double()


def bound(losses: Tensor, metric: str) -> float:
    """What the mean loss of unseen data exceeds, for any of TRIES models, in one of 100 draws.

    A drop is counted as if one more sample had been answered wrong: of few samples without any
    change little is known.

    Args:
        losses: [samples] of held-back data.
    """
    n = len(losses)
    if n < 2:
        raise CalibrationError("an accuracy budget needs some dozens of samples: give more calib")
    if metric == "drop":
        losses = torch.cat([losses, losses.new_ones(1)])
    return float(losses.mean() + SURE * losses.std() / math.sqrt(n))


def check_enough(budget: Budget, samples: int) -> None:
    """Raises CalibrationError where even perfect answers could not tell that a budget is kept."""
    if budget.metric == "drop":
        least = bound(torch.zeros(samples), "drop")
        if least > budget.limit:
            raise CalibrationError(
                f"budget {budget.text!r}: {samples} held-back samples cannot tell less than "
                f"{100 * least:.2g} %; give some {math.ceil(2 * samples * least / budget.limit)} "
                "samples, or a larger drop"
            )


def _predictions(out: Any) -> Tensor | None:
    """Logits of two classes or more."""
    logits = logits_of(out)
    return logits if logits is not None and logits.shape[-1] > 1 else None


def _answer(out: Any, batch: Batch) -> Tensor:
    logits = _predictions(out)
    return pool(out[0], batch.get("attention_mask")) if logits is None else logits


def _losses(want: Tensor, got: Tensor, batch: Batch, metric: str) -> Tensor:
    if metric == "cosine":
        return 1 - F.cosine_similarity(want.double(), got.double(), dim=-1)
    if metric == "kl":
        log_p, log_q = want.double().log_softmax(-1), got.double().log_softmax(-1)
        each = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    else:
        p = want.double().softmax(-1)
        each = p.amax(-1) - p.gather(-1, got.argmax(-1, keepdim=True))[..., 0]
    if each.dim() == 1:
        return each
    mask = batch.get("attention_mask")
    weight = torch.ones_like(each) if mask is None or mask.shape != each.shape else mask.to(each)
    return (each * weight).sum(1) / weight.sum(1).clamp(min=EPS)
