"""Float model against quantized model, batch by batch.

An encoder without a head is judged by its embedding (masked mean pooling, then L2 norm), a
classifier by its logits, a language model by its next-token distributions.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qtk.errors import CalibrationError
from qtk.observe import Batch
from qtk.observe.batches import prepare


@dataclass(frozen=True)
class Fidelity:
    """What quantization cost.

    Attributes:
        samples: outputs compared: sentences, images or tokens.
        cosine: mean cosine between float and quantized outputs; `worst_cosine` of the worst one.
        sqnr: signal to quantization noise of all outputs, dB.
        kl: mean KL(float || quantized) of the predicted distributions, nats; None for embeddings.
        agreement: share of samples with the same answer: the arg max of the logits, or the nearest
            other sample for embeddings; None with a single sample.
        metric_name, metric_float, metric_quantized: "accuracy" or "perplexity" where there are
            labels; None otherwise.
    """

    samples: int
    cosine: float
    worst_cosine: float
    sqnr: float
    kl: float | None = None
    agreement: float | None = None
    metric_name: str | None = None
    metric_float: float | None = None
    metric_quantized: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> str:
        """Two columns of plain text."""
        rows = [
            ("samples", f"{self.samples}"),
            ("cosine, mean", f"{self.cosine:.5f}"),
            ("cosine, worst", f"{self.worst_cosine:.5f}"),
            ("SQNR", f"{self.sqnr:.2f} dB"),
        ]
        if self.kl is not None:
            rows.append(("KL divergence", f"{self.kl:.5f} nats"))
        if self.agreement is not None:
            rows.append(("same answer", f"{100 * self.agreement:.2f} %"))
        if self.metric_name and self.metric_float is not None:
            rows.append((f"{self.metric_name}, float", f"{self.metric_float:.4f}"))
            rows.append((f"{self.metric_name}, quantized", f"{self.metric_quantized:.4f}"))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


@torch.no_grad()
def evaluate(model: nn.Module, qmodel: nn.Module, data: Any, tokenizer: Any = None) -> Fidelity:
    """Compares the two models on data in any form that `quantize` takes for `calib`.

    Batches may carry `labels`; then the task metric is measured as well: accuracy for classifiers,
    perplexity for language models.

    Raises:
        CalibrationError: the data is empty or not what the model reads.
    """
    items = list(data) if not isinstance(data, (str, dict, Tensor)) else data
    labels = [item.get("labels") if hasattr(item, "get") else None for item in items] \
        if isinstance(items, list) else []  # fmt: skip
    batches = prepare(model, items, tokenizer)
    want, got, targets = [], [], []
    was = model.training, qmodel.training
    model.eval(), qmodel.eval()
    for i, batch in enumerate(batches):
        label = labels[i] if i < len(labels) and len(labels) == len(batches) else None
        for y, y_hat, target in _outputs(model, qmodel, batch, label):
            want.append(y)
            got.append(y_hat)
            targets.append(target)
    model.train(was[0]), qmodel.train(was[1])
    if not want:
        raise CalibrationError("evaluate: the data holds no sample")
    known = all(t is not None for t in targets)
    return compare(
        torch.cat(want), torch.cat(got), is_logits=_has_logits(model),
        labels=torch.cat(targets) if known else None, causal=_is_causal(model),
    )  # fmt: skip


def compare(
    want: Tensor,
    got: Tensor,
    *,
    is_logits: bool,
    labels: Tensor | None = None,
    causal: bool = False,
) -> Fidelity:
    """The figures for [samples, features] of the float and of the quantized model."""
    want, got = want.double(), got.double()
    cosines = F.cosine_similarity(want, got, dim=-1)
    noise, signal = (want - got).square().sum(), want.square().sum()
    sqnr = float("inf") if noise == 0 else float(10 * torch.log10(signal / noise))
    kl = agreement = None
    if is_logits:
        log_p, log_q = want.log_softmax(-1), got.log_softmax(-1)
        kl = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
        agreement = float((want.argmax(-1) == got.argmax(-1)).double().mean())
    elif len(want) > 1:
        agreement = float((_nearest(want) == _nearest(got)).double().mean())
    metric: tuple[str | None, float | None, float | None] = (None, None, None)
    if is_logits and labels is not None:
        metric = _metric(want, got, labels, causal)
    return Fidelity(
        len(want), float(cosines.mean()), float(cosines.min()), sqnr, kl, agreement, *metric
    )


def embed(model: nn.Module, batch: Batch) -> Tensor:
    """[B, H]: mean of the last hidden state over the real tokens, L2 normalised."""
    hidden = model(**batch)[0].float()
    mask = batch.get("attention_mask")
    if mask is None:
        mask = hidden.new_ones(hidden.shape[:2])
    weights = mask[..., None].to(hidden.dtype)
    return F.normalize((hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9), dim=-1)


def _outputs(
    model: nn.Module, qmodel: nn.Module, batch: Batch, labels: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """[samples, features] of both models, and the labels of those samples."""
    if not _has_logits(model):
        yield embed(model, batch), embed(qmodel, batch), None
        return
    want, got = model(**batch), qmodel(**batch)
    y, y_hat = (getattr(out, "logits", out[0]).float() for out in (want, got))
    if y.dim() == 2:
        yield y, y_hat, labels
        return
    mask = batch.get("attention_mask")
    mask = torch.ones(y.shape[:2], device=y.device) if mask is None else mask
    if _is_causal(model):  # the next token is the label
        keep = mask[:, 1:].bool()
        yield y[:, :-1][keep], y_hat[:, :-1][keep], batch["input_ids"][:, 1:][keep]
    else:
        keep = mask.bool()
        yield y[keep], y_hat[keep], None if labels is None else labels[keep]


def _metric(want: Tensor, got: Tensor, labels: Tensor, causal: bool) -> tuple[str, float, float]:
    labels = labels.to(want.device)
    if causal:
        losses = [float(F.cross_entropy(y, labels).exp()) for y in (want, got)]
        return "perplexity", losses[0], losses[1]
    hits = [float((y.argmax(-1) == labels).double().mean()) for y in (want, got)]
    return "accuracy", hits[0], hits[1]


def _has_logits(model: nn.Module) -> bool:
    return "For" in type(model).__name__


def _is_causal(model: nn.Module) -> bool:
    return type(model).__name__.endswith("ForCausalLM")


def _nearest(embedding: Tensor) -> Tensor:
    """Index of the most similar other sample."""
    similarity = embedding @ embedding.T
    return similarity.fill_diagonal_(-torch.inf).argmax(-1)
