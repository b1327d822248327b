"""Float model against quantized model, batch by batch.

An encoder without a head is judged by its embedding (masked mean pooling, then L2 norm), a
classifier by its logits, a language model by its next-token distributions. Logits are summed up and
forgotten, so that the memory needed does not grow with the data; embeddings are kept, as each
one is compared with all others.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qtk.errors import CalibrationError
from qtk.fidelity.tally import CHUNK, Tally
from qtk.models import describe
from qtk.observe import Batch
from qtk.observe.batches import prepare

MAX_LOGITS = 2**26  # numbers that one forward pass may predict: 256 MB in float32


@dataclass(frozen=True)
class Fidelity:
    """What quantization cost.

    Attributes:
        samples: outputs compared: sentences, images or tokens.
        cosine: mean cosine between float and quantized outputs; `worst_cosine` of the worst one.
        sqnr: signal to quantization noise of all outputs, dB; infinite when nothing differs.
        kl: mean KL(float || quantized) of the predicted distributions, nats; None for embeddings.
        agreement: share of samples with the same answer: the arg max of the logits, or the nearest
            other sample for embeddings; None where there is nothing to choose from.
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
        """For JSON, which has no infinity: a figure that is not finite becomes None."""
        return {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in asdict(self).items()
        }

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

    Of a text file every line counts; of a folder of images, 256 that are drawn. Batches may carry
    `labels` (a tuple's second tensor), -100 where there is none; then the task metric is measured
    as well: accuracy for classifiers, perplexity for language models, which without labels
    predict their own input.

    Raises:
        CalibrationError: the data is empty or not what the model reads.
    """
    items = _items(data)
    labels = [_labels(item) for item in items] if isinstance(items, list) else []
    batches = prepare(model, items, tokenizer)
    if len(labels) != len(batches):  # texts and images, regrouped into batches
        labels = [None] * len(batches)
    was = model.training, qmodel.training
    model.eval(), qmodel.eval()
    try:
        return _compare_batches(model, qmodel, batches, labels)
    finally:
        model.train(was[0]), qmodel.train(was[1])


def embed(model: nn.Module, batch: Batch) -> Tensor:
    """[B, H]: mean of the last hidden state over the real tokens, L2 normalised."""
    return pool(model(**batch)[0], batch.get("attention_mask"))


def pool(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """[B, T, H], [B, T] -> [B, H] of length one, float32."""
    hidden = hidden.float()
    if mask is None:
        mask = hidden.new_ones(hidden.shape[:2])
    weights = mask[..., None].to(hidden)
    return F.normalize((hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9), dim=-1)


def nearest(embeddings: Tensor) -> Tensor:
    """[B, H] of length one -> [B], the index of the most similar other sample."""
    found = []
    for start in range(0, len(embeddings), CHUNK):
        part = embeddings[start : start + CHUNK]
        similarity = part @ embeddings.T
        rows = torch.arange(len(part), device=part.device)
        similarity[rows, rows + start] = -torch.inf
        found.append(similarity.argmax(-1))
    return torch.cat(found)


def _compare_batches(
    model: nn.Module, qmodel: nn.Module, batches: list[Batch], labels: list[Tensor | None]
) -> Fidelity:
    causal = type(model).__name__.endswith("ForCausalLM")
    extra = {"use_cache": False} if describe(model)[0].causal else {}
    tally, embeddings = Tally(causal=causal), []
    for batch, target in _pieces(model, batches, labels):
        out = model(**batch, **extra, return_dict=True)
        q_out = qmodel(**_like(qmodel, batch), **extra, return_dict=True)
        want, got = _logits(out), _logits(q_out)
        if want is None or got is None:
            mask = batch.get("attention_mask")
            pair = pool(out[0], mask), pool(q_out[0].to(out[0].device), mask)
            tally.add(*pair)
            embeddings.append(pair)
        elif want.dim() == 2:
            tally.add(want, got, target, answers=want.shape[1] > 1)
        else:
            tally.add(*_tokens(want, got, batch, target, causal), answers=True)
    agreement = None
    if tally.samples > 1 and embeddings:
        floats, quantized = (torch.cat(side) for side in zip(*embeddings, strict=True))
        agreement = float((nearest(floats) == nearest(quantized)).double().mean())
    if not tally.samples:
        raise CalibrationError("evaluate: the data holds no sample")
    figures = tally.figures()
    if embeddings:
        figures["agreement"] = agreement
    return Fidelity(**figures)


def _tokens(
    want: Tensor, got: Tensor, batch: Batch, labels: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """[B, T, V] of both models -> [tokens, V] of the real ones, and what they should predict."""
    mask = batch.get("attention_mask")
    keep = torch.ones(want.shape[:2], device=want.device) if mask is None else mask
    keep = keep.bool()
    if causal:  # position t predicts token t + 1
        labels = batch.get("input_ids") if labels is None else labels
        want, got, keep = want[:, :-1], got[:, :-1], keep[:, 1:]
        labels = None if labels is None else labels[:, 1:]
    if want.shape[:2] != keep.shape:  # predictions about patches, which no mask speaks of
        keep = torch.ones(want.shape[:2], dtype=torch.bool, device=want.device)
    return want[keep], got[keep.to(got.device)], None if labels is None else labels[keep]


def _pieces(
    model: nn.Module, batches: list[Batch], labels: list[Tensor | None]
) -> Iterator[tuple[Batch, Tensor | None]]:
    """The batches, cut where a prediction for every token of a vocabulary would not fit."""
    config: Any = model.config
    per_token = getattr(config, "vocab_size", 1) if hasattr(model, "lm_head") else 1
    for batch, target in zip(batches, labels, strict=True):
        main = batch.get("input_ids", next(iter(batch.values())))
        B, tokens = main.shape[0], main.shape[1] if main.dim() == 2 else 1
        rows = max(1, MAX_LOGITS // max(1, tokens * per_token))
        for start in range(0, B, rows):
            piece = {k: v[start : start + rows] if len(v) == B else v for k, v in batch.items()}
            part = None if target is None else target[start : start + rows].to(main.device)
            yield piece, part


def _logits(out: Any) -> Tensor | None:
    """What the model predicts, None for an encoder without a head."""
    found = (getattr(out, name, None) for name in ("logits", "start_logits", "prediction_logits"))
    return next((logits.float() for logits in found if logits is not None), None)


def _items(data: Any) -> Any:
    """The data as a list, or as a path that `prepare` reads."""
    if isinstance(data, (str, Path)):
        path = Path(data)
        if not path.is_file():
            return path
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise CalibrationError(f"{path} is not a UTF-8 text file") from None
        return [line.strip() for line in text.splitlines() if line.strip()]
    single = isinstance(data, Tensor) or hasattr(data, "keys")
    return [data] if single else list(data)


def _labels(item: Any) -> Tensor | None:
    if isinstance(item, (tuple, list)):
        return item[1] if len(item) > 1 and isinstance(item[1], Tensor) else None
    return item.get("labels") if hasattr(item, "get") else None


def _like(model: nn.Module, batch: Batch) -> Batch:
    """The batch where the model is, floats in its dtype."""
    at = next(p for p in model.parameters() if p.is_floating_point())
    return {
        k: v.to(at.device, at.dtype) if v.is_floating_point() else v.to(at.device)
        for k, v in batch.items()
    }
