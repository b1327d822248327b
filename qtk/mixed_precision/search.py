"""search(): bits for every unit under a budget, from measured losses and measured times."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qtk.errors import CalibrationError, SchemeError
from qtk.learn import resume as state
from qtk.mixed_precision import latency, sensitivity
from qtk.mixed_precision.allocate import allocate, total
from qtk.mixed_precision.budget import Budget, read
from qtk.mixed_precision.latency import Latencies
from qtk.mixed_precision.loss import Judge, bound, check_enough
from qtk.mixed_precision.result import Measured, Point, Search
from qtk.mixed_precision.sensitivity import Sensitivity
from qtk.mixed_precision.space import FLOATS, W8A8, Chosen, Matrix, Pair, Space, default_schemes
from qtk.mixed_precision.space import name_of as scheme_name
from qtk.mixed_precision.synthetic import synthetic
from qtk.observe import Batch
from qtk.observe.batches import SAMPLES, prepare
from qtk.pipeline import opened, run
from qtk.pipeline.progress import Bar, progress_bar
from qtk.pipeline.request import Request
from qtk.timing import race

logger = logging.getLogger("qtk")

OPTIONS: dict[str, Any] = {  # of quantize that a search passes on, and what they are by default
    "activations": "static", "weights": "symmetric", "group_size": None, "attention": "float",
    "softmax": "float", "softmax_bits": None, "method": None, "rounding": None, "ranges": None,
    "learn": None, "preset": None, "skip": None,
}  # fmt: skip
PROBED = 64  # samples that masks are measured on, and as many that layers alone are calibrated on
CHECKS = 5  # models that are quantized to find what keeps an accuracy budget
AIM = 0.9  # of an accuracy budget, for the next try
FRONT = 12  # points of the front
ROUNDS = 15


def search(
    model: nn.Module | str | Path,
    budget: str | Sequence[str],
    calib: Any = None,
    tokenizer: Any = None,
    *,
    schemes: Sequence[Pair] | None = None,
    verify: bool | int = True,
    batch_size: int = 16,
    latencies: str | Path | None = None,
    resume: str | Path | None = None,
    backend: str = "auto",
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> Search:
    """Chooses bits for the linears of the blocks under a budget; after OHQ.

    Losses come from forward passes of a float model in which some layers are quantized, times from
    the operations as they run on this device, and an integer program joins them. A budget of
    latency or bytes gives the smallest loss within it; one of accuracy the fewest bytes that keep
    it; both together the fewest bytes that keep all.

    Half of `calib` is held back: what is measured to verify was seen by no step before. An accuracy
    budget is kept by a bound that holds in 99 of 100 draws of such data.

    Args:
        model: in floating point, or the path or hub name of one.
        budget: "0.8x latency", "0.5x bytes" (of W8A8; "of float"), "12 ms", "6 MB", "cosine 0.99",
            "kl 0.01", "drop 0.5 %" (of answers), or several, joined by commas. Bytes are those of
            the searched layers.
        calib, tokenizer: as `qtk.quantize` takes them. Without data inputs are made up, and
            accuracy cannot be a budget.
        schemes: pairs (w, a) to choose from; by default six of integers, floating point, and FP8
            where the device has it.
        verify: quantizes what was chosen and measures it; a number measures as many points of the
            front besides. An accuracy budget without it rests on predictions alone.
        batch_size: rows of the batch whose latency counts.
        latencies: a file of timings, read and extended, of any number of devices.
        resume: a file that keeps the losses measured so far, so that an interrupted search goes on.
        backend, seed, progress: as `qtk.quantize` takes them.
        options: other options of `qtk.quantize`, which every model is quantized with.

    Raises:
        SchemeError: a budget that cannot be read or kept; the message states the feasible range.
        CalibrationError: data that is too little to tell.
        QtkError: as `qtk.quantize`.
    """
    budgets, chosen_options = read(budget), _options(options, seed)
    _check_batch_size(batch_size)
    kept = state.check(resume)
    source, blocks = opened(model, backend)
    pairs = default_schemes(next(source.parameters()).device) if schemes is None else schemes
    space = Space.of(source, blocks, pairs, calib, chosen_options)
    data = Data.of(source, calib, tokenizer, seed, budgets)
    with progress_bar(progress) as bar, torch.no_grad():
        times = _timed(source, space, data, batch_size, latencies, backend, bar)
        probe = _first_rows(data.seen, PROBED)
        losses = sensitivity.measure(
            source, blocks, None if calib is None else probe, Judge.of(source, probe), space,
            seed=seed, backend=backend, randoms=sensitivity.RANDOM, resume=kept, report=bar.show,
        )  # fmt: skip
        costs = Costs(space, losses, times)
        lab = Lab(source, data, costs, chosen_options, backend, batch_size, bar)
        return _search(budgets, costs, lab, verify)


def bench_ops(
    model: nn.Module | str | Path,
    calib: Any = None,
    tokenizer: Any = None,
    *,
    schemes: Sequence[Pair] | None = None,
    batch_size: int = 16,
    latencies: str | Path | None = None,
    backend: str = "auto",
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> Latencies:
    """Times the operations of a model at every scheme, as they would really run on this device.

    Args:
        calib: gives the length of what is read; without, inputs are made up.
        model, tokenizer, schemes, batch_size, latencies, backend, seed, progress, options: as
            `search` takes them.
    """
    _check_batch_size(batch_size)
    chosen_options = _options(options, seed)
    source, blocks = opened(model, backend)
    pairs = default_schemes(next(source.parameters()).device) if schemes is None else schemes
    space = Space.of(source, blocks, pairs, calib, chosen_options)
    data = Data.of(source, calib, tokenizer, seed, ())
    with progress_bar(progress) as bar:
        return _timed(source, space, data, batch_size, latencies, backend, bar)


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


@dataclass(frozen=True)
class Costs:
    """What every choice costs, and what budgets are relative to."""

    space: Space
    sensitivity: Sensitivity
    latencies: Latencies

    def matrix(self, metric: str) -> Matrix:
        """[U, S] of "latency" (without the rest), "bytes" or "loss"."""
        if metric == "latency":
            return self.latencies.seconds
        return self.space.bytes() if metric == "bytes" else self.sensitivity.effects

    def limit(self, budget: Budget) -> float:
        """Of the sum over units."""
        rest = self.latencies.rest if budget.metric == "latency" else 0.0
        if budget.of is None:
            return budget.limit - rest
        pair = W8A8 if budget.of == "w8a8" else FLOATS
        if pair not in self.space.schemes:
            raise SchemeError(f"budget {budget.text!r}: {scheme_name(pair)} is not among schemes")
        whole = total(self.matrix(budget.metric), self.space.uniform(pair)) + rest
        return budget.limit * whole - rest

    def point(self, name: str, chosen: Chosen) -> Point:
        seconds = total(self.latencies.seconds, chosen) + self.latencies.rest
        size = round(total(self.space.bytes(), chosen))
        return Point(name, chosen, self.sensitivity.predict(chosen), size, seconds)

    def check(self, limits: Mapping[Budget, float]) -> None:
        """Raises SchemeError for a budget that nothing keeps, with the range that is feasible."""
        for budget, limit in limits.items():
            least, most = self._range(budget)
            if limit < least[1] * (1 - 1e-9):
                raise SchemeError(
                    f"budget {budget.text!r} cannot be kept: feasible are {least[0]} to {most[0]}"
                )

    def _range(self, budget: Budget) -> tuple[tuple[str, float], tuple[str, float]]:
        """The ends of what a budget may be, in its own words and as a sum over units."""
        cost = self.matrix(budget.metric)
        rest = self.latencies.rest if budget.metric == "latency" else 0.0
        whole = None if budget.of is None else (self.limit(replace(budget, limit=1.0)) + rest)

        def words(value: float) -> tuple[str, float]:
            if whole is not None:
                return f"{(value + rest) / whole:.3g}x", value
            unit = "ms" if budget.metric == "latency" else "MB"
            return f"{(value + rest) * (1e3 if unit == 'ms' else 1e-6):.3g} {unit}", value

        return words(float(cost.min(1).sum())), words(float(cost.max(1).sum()))


@dataclass
class Lab:
    """Quantizes models and measures them."""

    source: Any
    data: Data
    costs: Costs
    options: Mapping[str, Any]
    backend: str
    batch_size: int
    bar: Bar

    def __post_init__(self) -> None:
        self.judge = Judge.of(self.source, self.data.held)

    @property
    def calib(self) -> list[Batch] | None:
        return self.data.seen if self.data.given else None

    def measured(self, point: Point, metric: str | None = None) -> Point:
        """The point with what it really costs.

        Args:
            metric: of an accuracy budget.
        """
        self.bar.show(f"verifying {point.name}", 0, 1)
        bits = self.costs.space.bits(point.chosen)
        if set(bits.values()) == {FLOATS}:
            qmodel = self.source
        else:
            request = Request.of(*W8A8, self.calib, bits=bits, **self.options)
            qmodel = run(
                self.source, self.calib, None, request, backend=self.backend, progress=False,
                inplace=False,
            )  # fmt: skip
        loss = float(self.judge.losses(qmodel).mean()) if self.data.given else None
        held = bound(self.judge.losses(qmodel, metric), metric) if metric else None
        batch = _rows(self.data.seen[-1], self.batch_size)
        seconds = race({"it": lambda: qmodel(**batch)}, ROUNDS, limit=2.0)["it"]
        return replace(point, measured=Measured(loss, held, seconds))


def _search(budgets: Sequence[Budget], costs: Costs, lab: Lab, verify: bool | int) -> Search:
    space = costs.space
    limits = {b: costs.limit(b) for b in budgets if not b.is_accuracy}
    costs.check(limits)
    within = [(costs.matrix(b.metric), limit) for b, limit in limits.items()]
    accuracy = [b for b in budgets if b.is_accuracy]
    checked: tuple[Point, ...] = ()
    if len(accuracy) > 1:
        raise SchemeError(f"{accuracy[0].text!r} and {accuracy[1].text!r}: give one of the two")
    if accuracy:
        point, checked = _accurate(accuracy[0], costs, lab, within, bool(verify))
    else:
        chosen = allocate(costs.matrix("loss"), within)
        if chosen is None:
            texts = ", ".join(b.text for b in budgets)
            raise SchemeError(f"budgets {texts}: each can be kept alone, not all together")
        point = costs.point("found", chosen)
        if verify:
            point = lab.measured(point)
            checked = (point,)
    _warn_of_slow(point, limits, costs)
    front = _front(costs)
    if verify and not isinstance(verify, bool):
        some = np.unique(np.linspace(0, len(front) - 1, min(verify, len(front))).astype(int))
        checked = (*(lab.measured(front[i]) for i in some), *checked)
    references = tuple(costs.point(scheme_name(p), space.uniform(p)) for p in space.schemes)
    return Search(
        tuple(b.text for b in budgets), lab.judge.metric, space, point, front, references, checked,
        costs.sensitivity, costs.latencies, lab.batch_size, lab.calib,
    )  # fmt: skip


def _warn_of_slow(point: Point, limits: Mapping[Budget, float], costs: Costs) -> None:
    """Says in the log where a model that was measured takes longer than a budget allows."""
    for budget, limit in limits.items():
        most = limit + costs.latencies.rest
        if budget.metric == "latency" and point.measured and point.measured.seconds > most:
            logger.warning(
                "budget %r is %.2f ms; what was found takes %.2f ms as measured, %.2f ms as "
                "predicted: a noisy machine, or a budget at the end of what is feasible",
                budget.text, 1e3 * most, 1e3 * point.measured.seconds, 1e3 * point.seconds,
            )  # fmt: skip


def _accurate(
    budget: Budget, costs: Costs, lab: Lab, within: list[tuple[Matrix, float]], verify: bool
) -> tuple[Point, tuple[Point, ...]]:
    """The fewest bytes whose held-back bound is within an accuracy budget.

    How a predicted loss becomes the budget's metric is learned on the way, from the models that
    were measured: between two of them along a power law, beyond them in proportion.
    """
    lab.judge.losses(lab.source, budget.metric)  # refuses a metric that the model does not have
    losses, sizes = costs.matrix("loss"), costs.matrix("bytes")
    best = allocate(losses, within)
    if best is None:
        raise SchemeError("the budgets of latency and bytes cannot be kept together")
    most, least = total(losses.max(1)[:, None], (0,) * len(best)), total(losses, best)
    aim = min(budget.limit * AIM, most)
    tried: list[Point] = []
    seen: set[Chosen] = set()
    for _ in range(CHECKS if verify else 1):
        chosen = allocate(sizes, [*within, (losses, max(aim, least) * (1 + 1e-9))])
        point = costs.point(f"try {len(tried) + 1}", chosen or best)
        if point.chosen in seen:
            break
        seen.add(point.chosen)
        if not verify:
            return replace(point, name="found"), ()
        tried.append(lab.measured(point, budget.metric))
        aim = _next_aim(tried, budget.limit)
    if not any(_keeps(p, budget.limit) for p in tried) and best not in seen:
        tried.append(lab.measured(costs.point("most accurate", best), budget.metric))
    kept = [p for p in tried if _keeps(p, budget.limit)]
    if not kept:
        found = min(p.measured.bound for p in tried if p.measured and p.measured.bound is not None)
        reach = f"cosine {1 - found:.4f}" if budget.metric == "cosine" else f"{found:.3g}"
        raise SchemeError(
            f"budget {budget.text!r} cannot be kept on held-back data: the best that is sure in 99 "
            f"of 100 draws is {reach}; allow more, add schemes such as (16, 16), or give more calib"
        )
    point = replace(min(kept, key=lambda p: p.bytes), name="found")
    return point, (*(p for p in tried if p.chosen != point.chosen), point)


def _keeps(point: Point, limit: float) -> bool:
    found = point.measured
    return found is not None and found.bound is not None and found.bound <= limit


def _next_aim(tried: Sequence[Point], limit: float) -> float:
    """The predicted loss at which the bound should be a little below its limit."""
    tiny = 1e-12
    pairs = sorted(
        (max(p.loss, tiny), max(p.measured.bound, tiny))
        for p in tried if p.measured is not None and p.measured.bound is not None
    )  # fmt: skip
    below = [pair for pair in pairs if pair[1] <= limit]
    above = [pair for pair in pairs if pair[1] > limit]
    if below and above and below[-1][0] < above[0][0]:
        (x0, y0), (x1, y1) = below[-1], above[0]
        share = np.log(max(AIM * limit, y0) / y0) / np.log(y1 / y0)
        return float(x0 * (x1 / x0) ** max(share, 0.25))
    x, y = below[-1] if below else above[0]
    return x * AIM * limit / y


def _front(costs: Costs) -> tuple[Point, ...]:
    """The smallest loss for as many bytes, from few to many."""
    sizes, losses = costs.matrix("bytes"), costs.matrix("loss")
    limits = np.geomspace(sizes.min(1).sum(), sizes.max(1).sum(), FRONT)
    found = [allocate(losses, [(sizes, float(limit) * (1 + 1e-9))]) for limit in limits]
    distinct = dict.fromkeys(chosen for chosen in found if chosen is not None)
    return tuple(costs.point(f"front {i + 1}", chosen) for i, chosen in enumerate(distinct))


def _timed(
    source: Any, space: Space, data: Data, batch_size: int, latencies: Any, backend: str, bar: Bar
) -> Latencies:
    """On the longest batch of the data, cut or repeated to the size that is asked about."""
    path = None if latencies is None else Path(os.fspath(latencies))
    batch = _rows(data.seen[-1], batch_size)
    return latency.measure(source, space, batch, backend=backend, path=path, report=bar.show)


def _check_batch_size(batch_size: object) -> None:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise SchemeError(f"batch_size={batch_size!r}: give a positive integer")


def _options(given: Mapping[str, Any], seed: int) -> dict[str, Any]:
    if unknown := [name for name in given if name not in OPTIONS]:
        raise SchemeError(f"search knows no {', '.join(unknown)}; choose {', '.join(OPTIONS)}")
    return {**OPTIONS, **given, "resume": None, "seed": seed}


def _every_other(batch: Batch, first: int) -> Batch | None:
    """Every other row, from the first or second on; None where there is none."""
    B = _size(batch)
    if first >= B:
        return None
    return {k: v[first::2] if _is_rows(v, B) else v for k, v in batch.items()}


def _rows(batch: Batch, count: int) -> Batch:
    """So many rows, repeated where there are fewer."""
    B = _size(batch)
    index = torch.arange(count) % B
    return {k: v[index.to(v.device)] if _is_rows(v, B) else v for k, v in batch.items()}


def _first_rows(batches: Sequence[Batch], count: int) -> list[Batch]:
    """Rows of all batches alike, so many together or a few more."""
    whole = sum(map(_size, batches))
    step = max(whole // count, 1)
    cut = ({k: v[::step] if _is_rows(v, _size(b)) else v for k, v in b.items()} for b in batches)
    return list(cut)


def _size(batch: Batch) -> int:
    return len(next(v for v in batch.values() if isinstance(v, Tensor) and v.dim()))


def _is_rows(value: Any, B: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == B
