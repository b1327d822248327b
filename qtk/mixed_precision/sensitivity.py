"""What each scheme costs each unit, found by forward passes of a partly quantized float model.

After OHQ's mask-guided estimation (Huang et al., "On-chip Hardware-aware Quantization for Mixed
Precision Neural Networks", 2023, https://arxiv.org/abs/2309.01945): parts of the network are
masked, here quantized, and the change of the output distribution is measured. No gradients, no
labels. The published formulas are not public; the masks and the estimator are this file's own:

    masks     each unit alone at each scheme; then many units together, drawn at random
    loss_m    mean KL of the predictions, or 1 - cosine of the embeddings, under mask m
    model     loss_m = sum_u effect[u, scheme of u in m]

Least squares with weights 1 / loss_m^2, because the error of such a sum grows with it, and effects
from 0 on. What the sum leaves over for the most sensitive pairs is told as interactions.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qtk import integrity
from qtk.learn import resume as state
from qtk.mixed_precision.allocate import total
from qtk.mixed_precision.loss import Judge
from qtk.mixed_precision.space import FLOATS, Chosen, Matrix, Space
from qtk.models import Block, fold_scales
from qtk.observe import Batch, imagine, walk
from qtk.pipeline.site import rounded_to_nearest

ALONE = -1  # in a mask: the unit stays in floating point
RANDOM = 60  # masks of many units
PAIRED = 5  # units whose pairs are measured together
KEEP = 20  # masks between two states on disk
TINY = 1e-9  # a loss below this is rounding

Mask = tuple[int, ...]  # the index of a scheme for each unit, or ALONE
Layers = list[list[dict[str, nn.Module]]]  # of each unit and scheme, by name
Report = Callable[[str, int, int], None]  # what is done, how much of it, out of how much


@dataclass(frozen=True)
class Interaction:
    """What two units cost together beyond the sum of what they cost alone."""

    first: str
    second: str
    scheme: int
    excess: float


@dataclass(frozen=True)
class Sensitivity:
    """Effects of U units at S schemes.

    Attributes:
        effects: [U, S], added to the loss; 0 for floating point.
        errors: [U, S], their standard errors.
        interactions: the largest first.
        residual: root mean square of measured over fitted loss of the random masks, less one.
    """

    effects: Matrix
    errors: Matrix
    interactions: tuple[Interaction, ...]
    residual: float

    def predict(self, chosen: Chosen) -> float:
        return total(self.effects, chosen)


@torch.no_grad()
def measure(
    model: nn.Module, blocks: Sequence[Block], batches: Sequence[Batch] | None, judge: Judge,
    space: Space, *, seed: int, backend: str, randoms: int, pairs: bool = True,
    resume: Path | None = None, report: Report = lambda *_: None,
) -> Sensitivity:  # fmt: skip
    """Quantizes every unit at every scheme, rounded to nearest, and measures masks of them.

    Args:
        batches: calibrate the layers; None to imagine what they read.
        judge: of the float model, on the samples that losses are measured on.
        randoms: masks of many units.
        pairs: whether interactions are measured too.
        resume: a file that keeps the losses measured so far; its folder is made.
    """
    masks = [*singles(space), *random_masks(space, randoms, seed)]
    losses = _Losses(resume, _identity(model, judge, space, seed, backend, masks), report)
    student = copy.deepcopy(model).eval()
    fold_scales(student, blocks)
    layers: Layers = []
    if not losses.has(len(masks) + (PAIRED * (PAIRED - 1) // 2 if pairs else 0)):
        sites = (
            imagine(student, blocks, seed) if batches is None else walk(student, blocks, batches)
        )
        layers = _made(sites, space, backend, report)

    before = _Before(blocks, space, len(judge.batches))

    def loss(mask: Mask) -> float:
        chosen = [layers[u][s] for u, s in enumerate(mask) if s != ALONE]
        swapped = {name: layer for found in chosen for name, layer in found.items()}
        with before.known(student, mask) as given, _swapped(student, {**given, **swapped}):
            return float(judge.losses(student).mean())

    measured = losses.of(masks, loss)
    effects, errors = fit(space, masks, measured)
    together = _pair_masks(space, effects) if pairs else []
    excess = losses.of([*masks, *together], loss)[len(masks) :]
    alone = dict(zip(masks, measured, strict=True))
    interactions = [
        _interaction(space, mask, x, alone) for mask, x in zip(together, excess, strict=True)
    ]
    interactions.sort(key=lambda found: -abs(found.excess))
    ratio = measured[len(masks) - randoms :] / _fitted(effects, masks[len(masks) - randoms :])
    residual = float(np.sqrt(np.mean((ratio - 1) ** 2))) if randoms else 0.0
    return Sensitivity(effects, errors, tuple(interactions), residual)


def singles(space: Space) -> list[Mask]:
    """Each unit alone at each scheme that rounds."""
    U, S = space.shape
    return [
        tuple(s if u == v else ALONE for v in range(U))
        for u in range(U) for s in range(S) if space.schemes[s] != FLOATS
    ]  # fmt: skip


def random_masks(space: Space, count: int, seed: int) -> list[Mask]:
    """Masks of many units: a third of them or more, at schemes drawn from some of all."""
    rng = np.random.default_rng(abs(seed))
    lossy = [s for s, pair in enumerate(space.schemes) if pair != FLOATS]
    found = []
    for _ in range(count):
        few = rng.permutation(lossy)[: rng.integers(1, len(lossy) + 1)]
        drawn = rng.choice(few, len(space.units))
        kept = rng.random(len(space.units)) < rng.uniform(1 / 3, 1)
        kept[rng.integers(len(kept))] = True
        found.append(tuple(int(s) if k else ALONE for s, k in zip(drawn, kept, strict=True)))
    return found


def fit(space: Space, masks: Sequence[Mask], losses: Tensor | np.ndarray) -> tuple[Matrix, Matrix]:
    """Effects [U, S] and their standard errors by weighted least squares."""
    from scipy.optimize import lsq_linear  # a second of `import qtk`

    U, S = space.shape
    rows = np.zeros((len(masks), U * S))
    for row, mask in zip(rows, masks, strict=True):
        row[[u * S + s for u, s in enumerate(mask) if s != ALONE]] = 1
    known = rows.any(0)
    y = np.asarray(losses, dtype=float)
    weights = 1 / np.maximum(y, max(TINY, 1e-3 * float(np.median(y))))
    A, b = rows[:, known] * weights[:, None], y * weights
    found = lsq_linear(A, b, (0, np.inf)).x
    freedom = max(len(masks) - int(known.sum()), 1)
    variance = float(np.square(A @ found - b).sum()) / freedom * np.linalg.pinv(A.T @ A).diagonal()
    effects, errors = np.zeros(U * S), np.zeros(U * S)
    effects[known], errors[known] = found, np.sqrt(np.maximum(variance, 0))
    return effects.reshape(U, S), errors.reshape(U, S)


def _fitted(effects: Matrix, masks: Sequence[Mask]) -> np.ndarray:
    sums = [sum(effects[u, s] for u, s in enumerate(mask) if s != ALONE) for mask in masks]
    return np.maximum(np.array(sums), TINY)


def _pair_masks(space: Space, effects: Matrix) -> list[Mask]:
    """Pairs of the units that cost most, each at the scheme that costs it most."""
    top = np.argsort(-effects.max(1))[:PAIRED]
    worst = int(effects.sum(0).argmax())
    U = len(space.units)
    return [tuple(worst if u in pair else ALONE for u in range(U)) for pair in combinations(top, 2)]


def _interaction(space: Space, mask: Mask, loss: float, alone: dict[Mask, float]) -> Interaction:
    first, second = (u for u, s in enumerate(mask) if s != ALONE)
    parts = [
        alone[tuple(s if u == v else ALONE for u, s in enumerate(mask))] for v in (first, second)
    ]
    names = space.units[first].name, space.units[second].name
    return Interaction(*names, mask[first], float(loss - sum(parts)))


def _made(sites: Iterator, space: Space, backend: str, report: Report) -> Layers:
    """The layers of each unit at each scheme."""
    layers: Layers = []
    wanted = {unit.linears[0] for unit in space.units}
    for site in sites:
        if not wanted & set(site.linears):
            continue
        report("quantizing alone", len(layers), len(space.units))
        layers.append([dict(rounded_to_nearest(site, a, backend)) for a in space.assignments])
    return layers


@contextmanager
def _swapped(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """A model with other modules, for a while."""
    kept = {name: model.get_submodule(name) for name in modules}
    try:
        for name, module in modules.items():
            model.set_submodule(name, module)
        yield
    finally:
        for name, module in kept.items():
            model.set_submodule(name, module)


class _Before:
    """What blocks before the first that a mask rounds give: masks in a row compute it once."""

    def __init__(self, blocks: Sequence[Block], space: Space, batches: int) -> None:
        self.batches = batches
        self.names = [block.name for block in blocks]
        self.chained = all(block.follows for block in blocks[1:])
        self.block_of = [
            next(i for i, name in enumerate(self.names) if unit.linears[0].startswith(f"{name}."))
            for unit in space.units
        ]  # fmt: skip
        self.depth = 0
        self.outputs: list[Any] = []  # of block depth - 1, a batch each

    @contextmanager
    def known(self, model: nn.Module, mask: Mask) -> Iterator[dict[str, nn.Module]]:
        """Modules that stand for these blocks; none while what they give is being recorded."""
        depth = min(self.block_of[u] for u, s in enumerate(mask) if s != ALONE)
        if not depth or not self.chained:
            yield {}
        elif depth == self.depth:
            yield {name: _Given(self.outputs) for name in self.names[:depth]}
        else:
            outputs: list[Any] = []
            self.depth, self.outputs = 0, outputs
            last = model.get_submodule(self.names[depth - 1])
            hook = last.register_forward_hook(lambda *call: outputs.append(call[2]))
            try:
                yield {}
            finally:
                hook.remove()
            self.depth = depth if len(outputs) == self.batches else 0  # 0: a block called twice


class _Given(nn.Module):
    """Answers with what was recorded, batch by batch."""

    def __init__(self, outputs: Sequence[Any]) -> None:
        super().__init__()
        self.outputs = iter(outputs)

    def forward(self, *_: Any, **__: Any) -> Any:
        return next(self.outputs)


class _Losses:
    """Losses of masks in order, kept on disk as they come."""

    def __init__(self, path: Path | None, identity: str, report: Report) -> None:
        self.path, self.identity, self.report = path, identity, report
        kept = {} if path is None else state.read(path, identity)
        self.found: list[float] = kept["losses"].tolist() if kept else []

    def has(self, count: int) -> bool:
        return len(self.found) >= count

    def of(self, masks: Sequence[Mask], loss: Callable[[Mask], float]) -> np.ndarray:
        for done in range(len(self.found), len(masks)):
            self.report("measuring masks", done, len(masks))
            self.found.append(loss(masks[done]))
            if self.path is not None and (done % KEEP == 0 or done + 1 == len(masks)):
                kept = torch.tensor(self.found, dtype=torch.float64)
                self.path.parent.mkdir(exist_ok=True)
                state.write(self.path, {"losses": kept}, self.identity)
        return np.array(self.found[: len(masks)])


def _identity(
    model: nn.Module, judge: Judge, space: Space, seed: int, backend: str, masks: list[Mask]
) -> str:
    """Of what goes in alone: sums and answers differ in their last bits from run to run."""
    weights = integrity.fingerprint(model)
    data = [{n: integrity.checksum(v) for n, v in batch.items()} for batch in judge.batches]
    choices = [{name: choice.facts() for name, choice in assignment.inside.items()}
               for assignment in space.assignments]  # fmt: skip
    return integrity.digest(weights, data, choices, seed, backend, masks)
