"""qtk.steal: clones made of the answers of the float model and of the quantized one."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qtk import integrity
from qtk.discover import load
from qtk.errors import CalibrationError, ModelError, SchemeError
from qtk.fidelity.compare import logits_of
from qtk.pipeline.progress import progress_bar
from qtk.security.clone import Build, build, teach
from qtk.security.theft import Row, Theft

DECIMALS = {"soft": 4, "rounded": 2}  # of probabilities, as an API gives them
ANSWERS = (*DECIMALS, "hard")
BATCH = 256
ROUND = 10  # epochs of a clone that a thief teaches to find its next queries
OFFSET = 7919  # clones must not start where the random student of a defence did
Test = tuple[Tensor, Tensor]


def steal(
    model: nn.Module,
    qmodel: nn.Module,
    pool: Mapping[str, Tensor],
    test: Test,
    *,
    thief: Sequence[str] = ("knockoff",),
    answers: Sequence[str] = ("soft", "hard"),
    budget: int = 3000,
    clone: str | Build = "cnn",
    epochs: int = 15,
    seeds: Sequence[int] = (0, 1, 2),
    train: Tensor | None = None,
    resume: str | Path | None = None,
    progress: bool = True,
) -> Theft:
    """Whether the quantized model can be cloned any better or worse than the float one.

    Args:
        model: an image classifier in floating point; `qmodel` quantized from it.
        pool: images [N, C, H, W] that thieves have, as the model reads them, by name. "in" is the
            model's own distribution and must be among them, as something else must be: a defence
            that holds against foreign images may not hold against these.
        test: images and labels [N] on which clones are judged.
        thief: names of files in qtk/security/thief.
        answers: what thieves are told: "soft" (probabilities with 4 decimals), "rounded" (2),
            "hard" (the class alone).
        budget: queries at most.
        clone: "cnn", "mlp", or a function of channels and classes.
        epochs: that a clone learns; the last one counts.
        seeds: of queries and clones, one clone each.
        train: the victim's training images: a pool that holds one of them is refused.
        resume: a folder that keeps every finished clone's figures, and is gone on from.
        progress: shows a bar.

    Raises:
        ModelError: a model that does not classify images.
        CalibrationError: pools, test images or labels that do not fit.
        SchemeError: a thief, a network or a kind of answer that does not exist.
    """
    start = time.perf_counter()
    _check(pool, test, answers, thief, budget, seeds)
    if train is not None:
        _check_apart(pool, train)
    victims = {"float": Victim(model), "quantized": Victim(qmodel)}
    for victim in victims.values():
        victim.look(test[0][:1], int(test[1].max()))
    settings = [budget, clone if isinstance(clone, str) else clone.__qualname__, epochs]
    cells = [
        _Cell(name, asked, kind, victim)
        for name in thief
        for asked in (
            pool if getattr(load("security.thief", name), "NEEDS_POOL", True) else ["none"]
        )
        for kind in answers
        for victim in victims
    ]
    known = _Kept(resume, settings, [*pool.values(), *test] if resume else [])
    reference = victims["float"].classes(test[0])
    rows = []
    with progress_bar(progress) as bar:
        for done, cell in enumerate(cells):
            bar.show(f"{cell.thief}, {cell.pool}, {cell.victim}", done, len(cells))
            images = pool[cell.pool] if cell.pool in pool else next(iter(pool.values()))
            victim = victims[cell.victim]
            figures = []
            for seed in seeds:
                make = partial(_one, cell, victim, images, test, reference, budget, clone, epochs,
                               seed)  # fmt: skip
                facts = [cell.thief, cell.pool, cell.answers, seed]
                figures.append(known.get(facts, victim, make))
            accuracy = _share(victim.classes(test[0]) == test[1])
            rows.append(_row(cell, accuracy, figures))
    return Theft(tuple(rows), len(test[1]), tuple(seeds), time.perf_counter() - start)


class Victim:
    """A model that answers queries; it counts nothing and keeps nothing of them."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._sum: str | None = None

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, K] float32, on the CPU."""
        at = next(p for p in self.model.parameters() if p.is_floating_point())
        training, found = self.model.training, []
        self.model.eval()
        try:
            for part in images.split(BATCH):
                out = self.model(part.to(at.device, at.dtype))
                logits = out.float() if isinstance(out, Tensor) else logits_of(out)
                if logits is None or logits.dim() != 2 or logits.shape[1] < 2:
                    raise ModelError(_no_head(self.model))
                found.append(logits.cpu())
        finally:
            self.model.train(training)
        return torch.cat(found)

    def classes(self, images: Tensor) -> Tensor:
        return self.logits(images).argmax(1)

    def answers(self, images: Tensor, kind: str) -> Tensor:
        """[N, C, H, W] -> [N, K], distributions as an API would give them."""
        logits = self.logits(images)
        if kind == "hard":
            return F.one_hot(logits.argmax(1), logits.shape[1]).float()
        rounded = logits.softmax(1).mul(10 ** DECIMALS[kind]).round()
        return rounded / rounded.sum(1, keepdim=True)

    def look(self, images: Tensor, label: int) -> None:
        """Raises ModelError or CalibrationError where it cannot answer, or has no such class."""
        name = getattr(self.model, "main_input_name", "pixel_values")
        if name != "pixel_values":
            raise ModelError(_no_head(self.model))
        classes = self.logits(images).shape[1]
        if label >= classes:
            raise CalibrationError(f"label {label}, but the model has {classes} classes")

    def checksum(self) -> str:
        """Of all that it holds."""
        if self._sum is None:
            held = self.model.state_dict()
            self._sum = integrity.digest(
                {k: integrity.checksum(v) for k, v in held.items() if isinstance(v, Tensor)}
            )
        return self._sum


@dataclass(frozen=True)
class _Cell:
    thief: str
    pool: str
    answers: str
    victim: str


class _Kept:
    """Figures of finished clones, in a folder or nowhere."""

    def __init__(self, folder: str | Path | None, settings: list[Any], data: list[Tensor]) -> None:
        self.folder = None if folder is None else Path(folder)
        self.facts = [settings, [integrity.checksum(each) for each in data]]
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def get(
        self, facts: list[Any], victim: Victim, make: Callable[[], dict[str, float]]
    ) -> dict[str, float]:
        if self.folder is None:
            return make()
        name = integrity.digest(self.facts, facts, victim.checksum())[:32]
        file = self.folder / f"{name}.json"
        if file.exists():
            held: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))
            return held
        made = make()
        integrity.write_text(file, json.dumps(made))
        return made


def _one(
    cell: _Cell, victim: Victim, pool: Tensor, test: Test, reference: Tensor, budget: int,
    network: str | Build, epochs: int, seed: int,
) -> dict[str, float]:  # fmt: skip
    """One clone: what it was taught with, and how it does."""
    start = time.perf_counter()
    channels, classes = pool.shape[1], victim.logits(pool[:1]).shape[1]

    def learn(inputs: Tensor, told: Tensor) -> nn.Module:
        return teach(build(network, channels, classes, OFFSET + seed), inputs, told, ROUND, seed)

    def answer(inputs: Tensor) -> Tensor:
        return victim.answers(inputs, cell.answers)

    generator = torch.Generator().manual_seed(OFFSET + seed)
    queries = load("security.thief", cell.thief).queries(answer, pool, budget, generator, learn)
    told = answer(queries)
    clone = teach(build(network, channels, classes, OFFSET + seed), queries, told, epochs, seed)
    guessed = Victim(clone).classes(test[0])
    return {
        "accuracy": _share(guessed == test[1]),
        "agreement": _share(guessed == victim.classes(test[0])),
        "agreement_float": _share(guessed == reference),
        "classes": len(told.argmax(1).unique()),
        "queries": len(queries),
        "seconds": time.perf_counter() - start,
    }


def _row(cell: _Cell, accuracy: float, figures: Sequence[Mapping[str, float]]) -> Row:
    def mean(name: str) -> float:
        return sum(figure[name] for figure in figures) / len(figures)

    return Row(
        cell.thief, cell.pool, cell.answers, cell.victim, accuracy,
        tuple(figure["accuracy"] for figure in figures), mean("agreement"),
        mean("agreement_float"), int(figures[0]["classes"]), int(figures[0]["queries"]),
        sum(figure["seconds"] for figure in figures),
    )  # fmt: skip


def _check(
    pool: Mapping[str, Tensor], test: Test, answers: Sequence[str], thief: Sequence[str],
    budget: int, seeds: Sequence[int],
) -> None:  # fmt: skip
    own = [load("security.thief", name) for name in thief]
    if wrong := [kind for kind in answers if kind not in ANSWERS]:
        raise SchemeError(f"no answers {wrong[0]!r}; there is: {', '.join(ANSWERS)}")
    if budget < 1 or not seeds or not own or not answers:
        raise SchemeError("a theft needs a thief, a kind of answer, a query and a seed")
    foreign = len(pool) > 1 or any(not getattr(each, "NEEDS_POOL", True) for each in own)
    if "in" not in pool or not foreign:
        raise CalibrationError(
            f"pool holds {', '.join(pool) or 'nothing'}; give images of the model's own kind as "
            "'in' and others beside them: a defence can hold against one and not the other"
        )
    shape = test[0].shape[1:]
    for name, images in pool.items():
        if images.dim() != 4 or images.shape[1:] != shape or not len(images):
            raise CalibrationError(
                f"pool {name!r} has shape {list(images.shape)}, test images "
                f"{list(test[0].shape)}; give the same size"
            )
    if len(test[0]) != len(test[1]) or not len(test[1]) or test[1].is_floating_point():
        raise CalibrationError(
            f"{len(test[0])} test images and {len(test[1])} labels ({test[1].dtype}); give a class "
            "number for each"
        )


def _check_apart(pool: Mapping[str, Tensor], train: Tensor) -> None:
    """Raises CalibrationError where a pool holds an image that the victim was trained on."""
    known = {integrity.checksum(image) for image in train}
    for name, images in pool.items():
        if same := [i for i, image in enumerate(images) if integrity.checksum(image) in known]:
            raise CalibrationError(
                f"{len(same)} images of pool {name!r} are among the victim's training images, "
                f"number {same[0]} first: a thief does not have them"
            )


def _no_head(model: nn.Module) -> str:
    return (
        f"{type(model).__name__} does not classify images: steal needs a model of images with a "
        "head of two classes or more, such as ViTForImageClassification"
    )


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())
