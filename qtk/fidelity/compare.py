"""Float model against quantized model, batch by batch.

An encoder without a head is judged by its embedding (masked mean pooling, then L2 norm), a
classifier by its logits, a language model by its next-token distributions. Data is read as it
is needed and logits are summed up and forgotten, so that the memory needed does not grow
with the data; embeddings are kept, as each one is compared with all others.
"""

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qtk.errors import CalibrationError, ModelError
from qtk.fidelity.clipping import Clipping
from qtk.fidelity.labels import as_tensor, check_labels, class_numbers
from qtk.fidelity.result import Fidelity
from qtk.fidelity.tally import CHUNK, EMBEDDING, LOGITS, SCORE, Tally
from qtk.fidelity.windows import windows
from qtk.integrations.sentence_transformers import unwrap
from qtk.integrations.transformers import open_model
from qtk.models import describe, is_network
from qtk.modules.linear import QuantLinear
from qtk.observe import Batch
from qtk.observe.batches import Labelled, stream
from qtk.observe.guard import reading

MAX_LOGITS = 2**26  # numbers that one forward pass may predict: 256 MB in float32


@torch.no_grad()
def evaluate(
    model: nn.Module | str | os.PathLike[str],
    qmodel: nn.Module | str | os.PathLike[str],
    data: Any,
    tokenizer: Any = None,
    *,
    samples: int | None = None,
    stride: int | None = None,
    window: int | None = None,
    seed: int = 0,
) -> Fidelity:
    """Compares the two models on data in any form that `quantize` takes for `calib`.

    Where samples have labels the task metric is measured as well: accuracy for classifiers,
    perplexity for language models, which without labels predict their own input. Labels are a
    batch's `labels` or `label`, a tuple's second part, the field of a row, or the class folders
    that images lie in; -100 stands for none.

    Args:
        model: in floating point, or the path or hub name of one; or a SentenceTransformer or
            CrossEncoder, as may be `qmodel`.
        qmodel: quantized from it, or the path or hub name of one.
        data: what to compare them on.
        tokenizer: tokenizer or image processor, or its folder; looked for beside the float model.
        samples: how many a file or folder gives at most, drawn; None for all.
        stride: reads the data as one text in overlapping windows, each of which predicts so many
            new tokens: the perplexity that papers report. For language models only.
        window: tokens of such a window; None for as many as the model has positions.
        seed: of the samples that are drawn.

    Raises:
        CalibrationError: the data is empty or not what the model reads.
        ModelError: the models are not of one kind, or in the wrong order.
    """
    given = unwrap(model, data, tokenizer)
    data, tokenizer = given.data, given.tokenizer
    reference, quantized = open_model(given.model), open_model(unwrap(qmodel).model)
    check_pair(reference, quantized)
    causal = type(reference).__name__.endswith("ForCausalLM")
    if stride is None:
        parts = stream(reference, data, tokenizer, seed, samples)
    elif causal:
        parts = windows(reference, data, tokenizer, stride, window)
    else:
        raise ModelError(f"stride is for language models; {type(reference).__name__} is none")
    numbers = class_numbers(reference, data)
    was = reference.training, quantized.training
    reference.eval(), quantized.eval()
    try:
        return _compare(reference, quantized, parts, numbers, causal)
    finally:
        reference.train(was[0]), quantized.train(was[1])


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


def check_pair(model: nn.Module, qmodel: nn.Module) -> None:
    """Raises ModelError for two models that cannot be compared."""
    quantized = [any(isinstance(m, QuantLinear) for m in x.modules()) for x in (model, qmodel)]
    if quantized == [True, False]:
        raise ModelError(
            "the first model is quantized, the second is not: give the float one first"
        )
    types = [
        getattr(getattr(x, "config", None), "model_type", type(x).__name__) for x in (model, qmodel)
    ]
    if types[0] != types[1]:
        names = [
            f"{type(x).__name__} ({kind})" for x, kind in zip((model, qmodel), types, strict=True)
        ]
        raise ModelError(
            f"{names[0]} and {names[1]} are of different kinds; give a model and what was "
            "quantized from it"
        )


def _compare(
    model: nn.Module, qmodel: nn.Module, parts: Iterator[Labelled], numbers: dict[str, int],
    causal: bool,
) -> Fidelity:  # fmt: skip
    extra: dict[str, Any] = {"use_cache": False} if describe(model)[0].causal else {}
    named = {} if is_network(model) else {"return_dict": True}
    tally, embeddings, clipping = Tally(causal=causal), [], Clipping(qmodel)
    for index, part in enumerate(_pieces(model, parts)):
        q_batch = _like(qmodel, part.batch)
        with reading(f"batch {index}"):
            out = model(**part.batch, **extra, **named)
            q_out = qmodel(**q_batch, **extra, **named)
        clipping.look(q_batch, **extra)
        labels, mask = as_tensor(part.labels, numbers), part.batch.get("attention_mask")
        want, got = logits_of(out), logits_of(q_out)
        _check_outputs(out[0] if want is None else want, q_out[0] if got is None else got)
        if want is None or got is None:
            pair = pool(out[0], mask), pool(q_out[0].to(out[0].device), mask)
            tally.add(*pair, names=part.names)
            embeddings.append(pair)
        elif want.dim() == 2:
            kind = LOGITS if want.shape[1] > 1 else SCORE
            labels = check_labels(labels, want) if kind == LOGITS else None
            tally.add(want, got, labels, kind, part.names)
        else:
            want, got, labels, owners = _tokens(want, got, part, labels, causal)
            tally.add(want, got, labels, LOGITS, part.names, owners)
    if not tally.samples:
        raise CalibrationError("evaluate: the data holds no sample")
    figures = tally.figures()
    if tally.kind == EMBEDDING and tally.samples > 1:
        floats, quantized = (torch.cat(side) for side in zip(*embeddings, strict=True))
        figures["agreement"] = float((nearest(floats) == nearest(quantized)).double().mean())
    return Fidelity(**figures, clipped=clipping.shares())


def _check_outputs(want: Tensor, got: Tensor) -> None:
    if want.shape != got.shape:
        raise ModelError(
            f"the models' outputs have shapes {list(want.shape)} and {list(got.shape)}; "
            "give a model and what was quantized from it, heads included"
        )


def _tokens(
    want: Tensor, got: Tensor, part: Labelled, labels: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """[B, T, V] of both models -> [tokens, V], what they should predict, and whose they are.

    Only tokens that are no padding count. The last of the four, [tokens], names the batch's row.
    """
    mask = part.batch.get("attention_mask")
    keep = torch.ones(want.shape[:2], device=want.device) if mask is None else mask
    keep = keep.bool()
    if causal:  # position t predicts token t + 1, and padding on the left predicts nothing
        labels = part.batch.get("input_ids") if labels is None else labels
        labels = check_labels(labels, want)
        want, got, keep = want[:, :-1], got[:, :-1], keep[:, 1:] & keep[:, :-1]
        if part.judged is not None:
            keep = keep & part.judged[:, 1:].to(keep.device)
        labels = None if labels is None else labels[:, 1:]
    else:
        labels = check_labels(labels, want)
    if want.shape[:2] != keep.shape:  # predictions about patches, which no mask speaks of
        keep = torch.ones(want.shape[:2], dtype=torch.bool, device=want.device)
    owners = keep.nonzero()[:, 0]
    return want[keep], got[keep.to(got.device)], None if labels is None else labels[keep], owners


def _pieces(model: nn.Module, parts: Iterator[Labelled]) -> Iterator[Labelled]:
    """The batches, cut where a prediction for every token of a vocabulary would not fit."""
    config: Any = getattr(model, "config", None)
    per_token = getattr(config, "vocab_size", 1) if hasattr(model, "lm_head") else 1
    for part in parts:
        main = part.batch.get("input_ids", next(iter(part.batch.values())))
        B, tokens = main.shape[0], main.shape[1] if main.dim() == 2 else 1
        rows = max(1, MAX_LOGITS // max(1, tokens * per_token))
        for start in range(0, B, rows):
            cut = slice(start, start + rows)
            batch = {k: v[cut] if v.dim() and len(v) == B else v for k, v in part.batch.items()}
            labels = None if part.labels is None else part.labels[cut]
            judged = None if part.judged is None else part.judged[cut]
            yield Labelled(batch, labels, part.names[cut], judged)


def class_logits(model: nn.Module, out: Any, wants: str) -> Tensor:
    """A classifier's output as logits, [B, C] float32 with C >= 2.

    Raises:
        ModelError: it has none; `wants` says who needs them and what to give instead.
    """
    logits = out.float() if isinstance(out, Tensor) else logits_of(out)
    if logits is None or logits.dim() != 2 or logits.shape[1] < 2:
        raise ModelError(
            f"{type(model).__name__} has no classifier head of two classes or more: {wants}"
        )
    return logits


def logits_of(out: Any) -> Tensor | None:
    """What the model predicts, None for an encoder without a head; of a plain network, its output.

    Raises:
        ModelError: a plain network's output is not [B, classes].
    """
    if isinstance(out, Tensor):
        if out.dim() != 2:
            raise ModelError(f"a network's output must be [B, classes], not {list(out.shape)}")
        return out.float()
    found = (getattr(out, name, None) for name in ("logits", "start_logits", "prediction_logits"))
    return next((logits.float() for logits in found if logits is not None), None)


def _like(model: nn.Module, batch: Batch) -> Batch:
    """The batch where the model is, floats in its dtype."""
    at = next((p for p in model.parameters() if p.is_floating_point()), None)
    if at is None:  # a network of integers alone reads what the float one does
        device = next(model.buffers()).device
        return {k: v.to(device) for k, v in batch.items()}
    return {
        k: v.to(at.device, at.dtype) if v.is_floating_point() else v.to(at.device)
        for k, v in batch.items()
    }
