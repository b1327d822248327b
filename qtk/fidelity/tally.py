"""Sums over pairs of outputs, from which every figure of a comparison follows at the end."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 1024  # rows compared at once, in float64
IGNORED = -100  # label of what is not to be judged, as in transformers


@dataclass
class Tally:
    """What has been seen so far.

    Attributes:
        causal: the labels are next tokens: perplexity instead of accuracy.
    """

    causal: bool = False
    samples: int = 0
    cosine: float = 0.0
    worst_cosine: float = math.inf
    noise: float = 0.0
    signal: float = 0.0
    kl: float = 0.0
    same: int = 0
    answered: int = 0  # samples that choose among several answers
    labelled: int = 0
    score: float = 0.0  # hits, or negative log likelihoods, of the float model
    q_score: float = 0.0

    def add(
        self, want: Tensor, got: Tensor, labels: Tensor | None = None, answers: bool = False
    ) -> None:
        """Takes in outputs of the float and of the quantized model.

        Args:
            want, got: [samples, features].
            labels: [samples] integers, `IGNORED` where there is none.
            answers: the features are logits.
        """
        for start in range(0, len(want), CHUNK):
            rows = slice(start, start + CHUNK)
            x = want[rows].double()
            y = got[rows].to(x.device).double()
            self._add_distance(x, y)
            if answers:
                self._add_answers(x, y, None if labels is None else labels[rows].to(x.device))

    def figures(self) -> dict[str, Any]:
        """The fields of a `Fidelity`."""
        clean = self.noise == 0
        ratio = 0.0 if clean or self.signal == 0 else self.signal / self.noise
        metric = None
        if self.labelled:
            metric = "perplexity" if self.causal else "accuracy"
        return {
            "samples": self.samples,
            "cosine": self.cosine / self.samples,
            "worst_cosine": self.worst_cosine,
            "sqnr": math.inf if clean else 10 * math.log10(ratio) if ratio else -math.inf,
            "kl": self.kl / self.answered if self.answered else None,
            "agreement": self.same / self.answered if self.answered else None,
            "metric_name": metric,
            "metric_float": self._metric(self.score),
            "metric_quantized": self._metric(self.q_score),
        }

    def _add_distance(self, x: Tensor, y: Tensor) -> None:
        cosines = F.cosine_similarity(x, y, dim=-1)
        self.samples += len(x)
        self.cosine += float(cosines.sum())
        self.worst_cosine = float(cosines.min().clamp(max=self.worst_cosine))  # nan stays nan
        self.noise += float((x - y).square().sum())
        self.signal += float(x.square().sum())

    def _add_answers(self, x: Tensor, y: Tensor, labels: Tensor | None) -> None:
        log_p, log_q = x.log_softmax(-1), y.log_softmax(-1)
        self.kl += float(F.kl_div(log_q, log_p, log_target=True, reduction="sum"))
        self.same += int((x.argmax(-1) == y.argmax(-1)).sum())
        self.answered += len(x)
        if labels is None or labels.is_floating_point():
            return
        known = labels != IGNORED
        labels, log_p, log_q = labels[known].long(), log_p[known], log_q[known]
        self.labelled += len(labels)
        self.score += _score(log_p, labels, self.causal)
        self.q_score += _score(log_q, labels, self.causal)

    def _metric(self, score: float) -> float | None:
        if not self.labelled:
            return None
        mean = score / self.labelled
        if not self.causal:
            return mean
        return math.exp(mean) if mean < 700 else math.inf


def _score(log_p: Tensor, labels: Tensor, causal: bool) -> float:
    """Summed negative log likelihood, or the number of hits."""
    if causal:
        return float(F.nll_loss(log_p, labels, reduction="sum"))
    return float(torch.sum(log_p.argmax(-1) == labels))
