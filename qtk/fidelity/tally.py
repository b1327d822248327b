"""Sums over pairs of outputs, from which every figure of a comparison follows at the end.

Embeddings are compared by their cosine. The cosine of logits says little: of two classes it is 1 or
-1, and a constant added to all of them moves it but no prediction. So predictions are compared by
their KL divergence, and the noise in logits is measured after their mean is taken off.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qtk.numerics import decibels

CHUNK = 1024  # rows compared at once, in float64
IGNORED = -100  # label of what is not to be judged, as in transformers
WORST = 10  # samples that are named
EMBEDDING, LOGITS, SCORE = "embedding", "logits", "score"  # a score is a single number

Name = int | str


@dataclass
class Tally:
    """What has been seen so far.

    Attributes:
        kind: of the outputs, set by the first ones that are added.
        causal: the labels are next tokens: perplexity instead of accuracy.
        errors: the worst samples, as (how bad, name, figure), a heap with the least bad first.
    """

    causal: bool = False
    kind: str = EMBEDDING
    samples: int = 0
    cosine: float = 0.0
    worst_cosine: float = math.inf
    noise: float = 0.0
    signal: float = 0.0
    kl: float = 0.0
    worst_kl: float = 0.0
    same: int = 0
    labelled: int = 0
    score: float = 0.0  # hits, or negative log likelihoods, of the float model
    q_score: float = 0.0
    errors: list[tuple[float, str, Name, float]] = field(default_factory=list)

    def add(
        self, want: Tensor, got: Tensor, labels: Tensor | None = None, kind: str = EMBEDDING,
        names: Sequence[Name] = (), owners: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Takes in outputs of the float and of the quantized model.

        Args:
            want, got: [rows, features].
            labels: [rows] integers, `IGNORED` where there is none.
            kind: what the features are.
            names: of the samples that the rows belong to, for the worst of them.
            owners: [rows], the index in `names` of each row; None where each row is a sample.
        """
        self.kind, found = kind, []
        for start in range(0, len(want), CHUNK):
            rows = slice(start, start + CHUNK)
            x = want[rows].double()
            y = got[rows].to(x.device).double()
            self.samples += len(x)
            if kind == EMBEDDING:
                found.append(self._add_cosines(x, y))
            elif kind == LOGITS:
                x, y = (v - v.mean(-1, keepdim=True) for v in (x, y))
                known = None if labels is None else labels[rows].to(x.device)
                found.append(self._add_answers(x, y, known))
            else:
                found.append((x - y).abs().amax(-1))
            self.noise += float((x - y).square().sum())
            self.signal += float(x.square().sum())
        if found and names:
            self._add_names(torch.cat(found).cpu(), names, owners)

    def figures(self) -> dict[str, Any]:
        """The fields of a `Fidelity`."""
        is_embedding, is_answer = self.kind == EMBEDDING, self.kind == LOGITS
        metric = None
        if self.labelled:
            metric = "perplexity" if self.causal else "accuracy"
        return {
            "samples": self.samples,
            "cosine": self.cosine / self.samples if is_embedding else None,
            "worst_cosine": self.worst_cosine if is_embedding else None,
            "sqnr": decibels(self.signal, self.noise),
            "kl": self.kl / self.samples if is_answer else None,
            "worst_kl": self.worst_kl if is_answer else None,
            "agreement": self.same / self.samples if is_answer else None,
            "metric_name": metric,
            "metric_float": self._metric(self.score),
            "metric_quantized": self._metric(self.q_score),
            "worst": tuple((name, value) for _, _, name, value in sorted(self.errors)[::-1]),
        }

    def _add_cosines(self, x: Tensor, y: Tensor) -> Tensor:
        cosines = F.cosine_similarity(x, y, dim=-1)
        self.cosine += float(cosines.sum())
        self.worst_cosine = float(cosines.min().clamp(max=self.worst_cosine))  # nan stays nan
        return cosines

    def _add_answers(self, x: Tensor, y: Tensor, labels: Tensor | None) -> Tensor:
        log_p, log_q = x.log_softmax(-1), y.log_softmax(-1)
        kl = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
        self.kl += float(kl.sum())
        self.worst_kl = float(kl.max().clamp(min=self.worst_kl))
        self.same += int((x.argmax(-1) == y.argmax(-1)).sum())
        if labels is None or labels.is_floating_point():
            return kl
        known = labels != IGNORED
        labels, log_p, log_q = labels[known].long(), log_p[known], log_q[known]
        self.labelled += len(labels)
        self.score += _score(log_p, labels, self.causal)
        self.q_score += _score(log_q, labels, self.causal)
        return kl

    def _add_names(self, figures: Tensor, names: Sequence[Name], owners: Tensor | None) -> None:
        """Remembers the worst samples; of several rows the mean counts."""
        if owners is None:
            means = figures.tolist()
        else:
            owners = owners.cpu()
            sums = torch.zeros(len(names), dtype=figures.dtype).index_add_(0, owners, figures)
            means = (sums / owners.bincount(minlength=len(names))).tolist()
        for name, mean in zip(names, means, strict=True):
            bad = -mean if self.kind == EMBEDDING else mean
            bad = math.inf if math.isnan(bad) else bad
            heapq.heappush(self.errors, (bad, str(name), name, mean))
            if len(self.errors) > WORST:
                heapq.heappop(self.errors)

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
