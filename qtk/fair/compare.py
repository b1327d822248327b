"""qtk.fairness: the same rows asked of both models, and what rounding changed for whom."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qtk.discover import load
from qtk.errors import CalibrationError, SchemeError
from qtk.fair import decoder as vae
from qtk.fair import text
from qtk.fair.answer import Answer, check_head, check_labels, decide, ties
from qtk.fair.decoder import Decoder
from qtk.fair.domain import Attribute, Domain
from qtk.fair.groups import METRICS, UNLABELLED
from qtk.fair.result import Churn, Disparity, Fairness, Instances
from qtk.fair.sides import Sides
from qtk.intervals import Figure
from qtk.pipeline.progress import Bar, progress_bar

ENUMERABLE = 200_000
Protected = Attribute | Sequence[Attribute] | Mapping[str, str] | Mapping[str, Sequence[str]]


def fairness(
    model: nn.Module,
    qmodel: nn.Module,
    rows: Any,
    protected: Protected,
    labels: Any = None,
    tokenizer: Any = None,
    *,
    second: nn.Module | None = None,
    domain: Sequence[Sequence[int]] | None = None,
    probe: Sequence[Any] = ("random", "latent"),
    n: int = 3000,
    exhaustive: bool | str = "auto",
    metrics: Sequence[str] | None = None,
    decoder: Decoder | None = None,
    favourable: int = 1,
    batch_size: int = 1024,
    seed: int = 0,
    progress: bool = True,
) -> Fairness:
    """Whom the quantized model treats otherwise than the float one.

    A row is discriminatory where changing the protected attribute alone, to any other value,
    changes the decision. Reported for both models: accuracy, IF_r (the share of discriminatory rows
    among random valid ones, by probe), IF_o (among the rows given), SPD, DI, EOD, AOD (see
    `qtk.fair.groups`); and churn, which a net figure hides: what became unfair and what became
    fair, and whose decisions changed.

    Args:
        model: a classifier in floating point; `qmodel` quantized from it.
        rows: token ids [N, T] of rows of one length, or batches (dicts with `input_ids` and perhaps
            `labels`); or sentences, with `protected` as swaps or templates.
        protected: one `Attribute` or several, each looked at by itself. For sentences: swaps,
            {"he": "she"}, tried both ways where that is not ambiguous; or templates,
            {"who": ["he", "she"]} for sentences with "{who}".
        labels: [N], of the rows; None takes those of the batches, if any.
        tokenizer: of sentences, or its folder; looked for beside the float model.
        second: another model quantized alike with another calibration seed: the noise floor, below
            which a difference is printed as none.
        domain: the valid token ids of each position; None for those that occur.
        probe: names of files in qtk/fair/probe, or functions like theirs.
        n: rows that a probe tries at most.
        exhaustive: whether all valid rows are asked; "auto" where they are 200,000 at most.
        metrics: which of accuracy, IF_o, SPD, DI, EOD, AOD, |AOD|; None for all that the data
            allows.
        decoder: of latents, for the probe "latent"; None trains a small VAE on the rows.
        favourable: the class that is good to get.
        batch_size: rows of one forward pass.
        seed: of what is drawn: probes, decoder and bootstrap.
        progress: shows a bar.

    Raises:
        ModelError: no classifier head.
        CalibrationError: rows, labels or domain that do not fit.
        SchemeError: an attribute, a metric or a probe that does not exist.
    """
    start = time.perf_counter()
    models = [model, qmodel, *([] if second is None else [second])]
    for each in models:
        check_head(each)
    _check_metrics(metrics, favourable, model)
    answers = [Answer(each, favourable, batch_size) for each in models]
    if isinstance(protected, Mapping):
        return text.compare(answers, rows, protected, labels, tokenizer, seed, start)
    attributes = [protected] if isinstance(protected, Attribute) else list(protected)
    given, labels = _rows(rows, labels)
    space = Domain.of(given, attributes, domain)
    needed = [name for name in metrics or () if name not in (*UNLABELLED, "IF_o")]
    if needed and labels is None:
        raise CalibrationError(f"{', '.join(needed)} need labels: give labels=, one a row")
    whole = _whole(space, exhaustive)
    probes = [*probe, *(["exhaustive"] if whole and "exhaustive" not in probe else [])]
    with progress_bar(progress) as bar:
        for done, answer in enumerate(answers if whole else []):
            bar.show("asking about all rows", done, len(answers))
            answer.enumerate(space)
        study = _Study(answers, given, labels, space, seed, whole)
        found = _probed(study, attributes, probes, n, decoder, bar)
    return Fairness(
        samples=len(given), domain=space.size if whole else None, seed=seed,
        figures=tuple(study.figures(attributes, metrics)), instances=tuple(found),
        churn=tuple(study.churn(attributes)), disparities=tuple(study.disparities(attributes)),
        wrong_p=study.wrong_p(), ties=study.ties(), seconds=time.perf_counter() - start,
    )  # fmt: skip


@dataclass
class _Study:
    """Two or three models on the same rows."""

    answers: list[Answer]
    rows: Tensor
    labels: Tensor | None
    domain: Domain
    seed: int
    whole: bool

    def __post_init__(self) -> None:
        self.logits = [answer.logits(self.rows) for answer in self.answers]
        self.data = self._sides(self.logits)
        if self.labels is not None and int(self.labels.max()) >= self.logits[0].shape[1]:
            raise CalibrationError(
                f"label {int(self.labels.max())}, but the model has {self.logits[0].shape[1]} "
                "classes"
            )

    def _sides(self, logits: list[Tensor]) -> Sides:
        return Sides([decide(each) for each in logits], self.answers[0].favourable, self.seed)

    def figures(
        self, attributes: Sequence[Attribute], metrics: Sequence[str] | None
    ) -> list[Figure]:
        labelled = self.labels is not None
        possible = [*METRICS] if labelled else [*UNLABELLED]
        asked = metrics or [*(["accuracy"] if labelled else []), "IF_o", *possible]
        found = []
        if "accuracy" in asked and self.labels is not None:
            found.append(self.data.accuracy(self.labels))
        for attribute in attributes:
            if "IF_o" in asked:
                unfair = [answer.unfair(self.rows, attribute) for answer in self.answers]
                found.append(self.data.share(attribute.name, "IF_o", unfair))
            group = attribute.group(self.rows)
            for name in asked:
                if name in METRICS:
                    found.append(self.data.metric(attribute.name, name, group, self.labels))
        return found

    def places(self) -> list[tuple[str, Tensor, Sides]]:
        """Where decisions are compared: on the data, and on all valid rows."""
        found = [("data", self.rows, self.data)]
        if self.whole:
            found.append(("domain", self.domain.all(),
                          self._sides([answer.known for answer in self.answers])))  # fmt: skip
        return found

    def churn(self, attributes: Sequence[Attribute]) -> list[Churn]:
        found = []
        for where, rows, sides in self.places():
            everyone = torch.ones(len(rows), dtype=torch.bool)
            found.append(sides.churn("", "all", where, everyone))
            for attribute in attributes:
                for value, label in zip(attribute.values, attribute.labels, strict=True):
                    own = rows[:, attribute.position] == value
                    name = f"{attribute.name} = {label}"
                    found.append(sides.churn(attribute.name, name, where, own))
        return found

    def disparities(self, attributes: Sequence[Attribute]) -> list[Disparity]:
        return [
            sides.disparity(attribute.name, where, attribute.group(rows))
            for where, rows, sides in self.places()
            for attribute in attributes
        ]

    def wrong_p(self) -> float | None:
        return None if self.labels is None else self.data.wrong_p(self.labels)

    def ties(self) -> tuple[int, int]:
        return ties(self.logits[0]), ties(self.logits[1])


def _probed(
    study: _Study, attributes: Sequence[Attribute], probes: Sequence[Any], n: int,
    decoder: Decoder | None, bar: Bar,
) -> list[Instances]:  # fmt: skip
    """Each probe on each attribute, with the same chance for both models."""
    found = []
    for done, given in enumerate(probes):
        draw, name, needs_decoder = _probe(given)
        bar.show(f"probe {name}", done, len(probes))
        if needs_decoder:
            decoder = decoder or vae.fit(study.rows, study.domain, study.seed)
            draw = partial(draw, decoder=decoder)
        for attribute in attributes:
            found.append(_tried(study, attribute, name, draw, n))
    return found


def _tried(
    study: _Study, attribute: Attribute, name: str, draw: Callable[..., Tensor], n: int
) -> Instances:
    tried = []
    for answer in study.answers[:2]:
        generator = torch.Generator().manual_seed(study.seed)
        tried.append(draw(answer, study.rows, study.domain, attribute, n, generator))
    own, *others = (answer.unfair(tried[0], attribute) for answer in study.answers)
    theirs = others[0] if torch.equal(*tried) else study.answers[1].unfair(tried[1], attribute)
    changes = [(int((other & ~own).sum()), int((own & ~other).sum())) for other in others]
    return Instances(
        attribute.name, name, len(tried[0]), int(own.sum()), len(tried[1]), int(theirs.sum()),
        *changes[0], changes[1] if len(changes) > 1 else None,
    )  # fmt: skip


def _probe(given: Any) -> tuple[Callable[..., Tensor], str, bool]:
    """What draws, its name, and whether it wants a decoder."""
    home = load("fair.probe", given) if isinstance(given, str) else given
    draw = getattr(home, "draw", home)
    if not callable(draw):
        raise SchemeError(f"a {type(given).__name__} is no probe: give a name or a function `draw`")
    name = str(getattr(home, "__name__", type(home).__name__)).rpartition(".")[2]
    return draw, name, getattr(home, "NEEDS_DECODER", False)


def _whole(space: Domain, exhaustive: bool | str) -> bool:
    """Whether all valid rows are asked.

    Raises:
        SchemeError: neither True, False nor "auto"; or more than any memory holds.
    """
    if exhaustive not in (True, False, "auto"):
        raise SchemeError(f"exhaustive={exhaustive!r}: give True, False or 'auto'")
    if exhaustive is True and space.size > 100 * ENUMERABLE:
        raise SchemeError(
            f"exhaustive=True asks all of {space.size:.3g} rows; give a smaller domain="
        )
    return exhaustive is True or (exhaustive == "auto" and space.size <= ENUMERABLE)


def _check_metrics(metrics: Sequence[str] | None, favourable: int, model: Any) -> None:
    known = ("accuracy", "IF_o", *METRICS)
    if wrong := [name for name in metrics or () if name not in known]:
        raise SchemeError(f"no metric {wrong[0]!r}; there is: {', '.join(known)}")
    if not 0 <= favourable < model.config.num_labels:
        raise SchemeError(
            f"favourable={favourable}, but the model has {model.config.num_labels} classes"
        )


def _rows(rows: Any, labels: Any) -> tuple[Tensor, Tensor | None]:
    """Rows [N, T] and labels [N] of what the user gave.

    Raises:
        CalibrationError: not rows of one length, or not a label each.
    """
    batches = [rows] if isinstance(rows, (Tensor, Mapping)) else list(rows)
    ids: list[Tensor] = []
    named: list[Any] = []
    for batch in batches:
        own = batch.get("input_ids") if isinstance(batch, Mapping) else batch
        if not isinstance(own, Tensor) or own.dim() != 2 or own.is_floating_point():
            raise CalibrationError(
                "rows are token ids [N, T], or batches with input_ids; sentences need `protected` "
                "as swaps, such as qtk.fair.text.SWAPS"
            )
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if mask is not None and not bool(mask.all()):
            raise CalibrationError("rows have padding: all must have the same tokens in number")
        ids.append(own.detach().cpu().long())
        named.append(batch.get("labels") if isinstance(batch, Mapping) else None)
    if not ids or not sum(map(len, ids)) or len({own.shape[1] for own in ids}) > 1:
        raise CalibrationError("rows are empty, or not of one length")
    if labels is None and all(own is not None for own in named):
        labels = torch.cat([own.reshape(-1) for own in named])
    return torch.cat(ids), check_labels(labels, sum(map(len, ids)))
