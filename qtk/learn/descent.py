"""Learning what was rounded: one descent for a block and for a whole model."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

HELD_OUT = 8  # one batch in so many is not learned from, and decides when to stop
PATIENCE = 4  # checks in a row without a lower held-out loss that end the descent

Report = Callable[[int, int, float], None]  # steps done, steps in all, loss on held-out batches


class Trainable(Protocol):
    """What can be learned of one linear layer (`qtk.learn.trainable.TrainableLinear`).

    `kept` is the share of its input that is quantized, drawn from `generator`.
    """

    kept: float
    generator: torch.Generator | None

    @property
    def offset(self) -> Tensor: ...
    @property
    def log_scale(self) -> Tensor: ...
    @property
    def bias(self) -> Tensor | None: ...
    @property
    def log_input_scale(self) -> Tensor | None: ...
    @property
    def input_zero_point(self) -> Tensor | None: ...


@dataclass(frozen=True)
class Rates:
    """Learning rates at the first step of a cosine.

    Attributes:
        offset: in steps of the weight's grid. scale: of logarithms of steps, and of biases relative
            to their layer's own size. zero_point: in codes.
    """

    offset: float
    scale: float
    zero_point: float


@dataclass
class Task:
    """A descent to be made.

    Attributes:
        linears: what is learned.
        loss: of batch i, a scalar with gradients.
        batches: how many there are.
        seed: of the order of the batches.
        report: called at every check.
        keep: called now and then with a state to keep, which `state` may bring back later.
    """

    linears: Sequence[Trainable]
    loss: Callable[[int], Tensor]
    batches: int
    seed: int = 0
    report: Report = lambda done, total, loss: None
    keep: Callable[[dict[str, Tensor]], None] | None = None
    state: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Learned:
    """The loss on held-out batches before and after; the same where nothing held."""

    before: float
    after: float


def descend(
    task: Task, steps: int, rates: Rates, checks: int, *, patience: int = PATIENCE
) -> Learned:
    """Adam on straight-through gradients; leaves the best parameters that the held-out batches saw.

    Those include the first, so that the held-out loss never rises. The last state that is kept
    counts as all steps done, and gives the same parameters again at once.

    Args:
        steps: batches that are learned from.
        checks: how often the held-out loss is taken, and the state kept.
        patience: checks in a row without a lower held-out loss that end it early.
    """
    groups = _groups(task.linears, rates)
    parameters = [p for group in groups for p in group["params"]]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    learned_from, held_out = split(task.batches)
    done, since, best = 0, 0, [p.detach().clone() for p in parameters]
    if task.state:
        done, since, first, best_loss = _restore(task.state, optimizer, parameters, best)
    else:
        first = best_loss = _held_out_loss(task, held_out)
    task.report(done, steps, best_loss)
    every = max(steps // checks, 1)
    for step in range(done, steps):
        if since >= patience:
            break
        for group in optimizer.param_groups:
            group["lr"] = group["first"] * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        _draw_from(task, step)
        with torch.enable_grad():
            loss = task.loss(_batch(learned_from, step, task.seed))
            loss.backward()
        optimizer.step()
        if (step + 1) % every == 0 or step + 1 == steps:
            now = _held_out_loss(task, held_out)
            since += 1
            if now < best_loss:
                best_loss, best, since = now, [p.detach().clone() for p in parameters], 0
            task.report(step + 1, steps, best_loss)
            ends = since >= patience or step + 1 == steps
            if task.keep is not None:
                reached = steps if ends else step + 1
                task.keep(_state(optimizer, parameters, best, reached, since, first, best_loss))
    with torch.no_grad():
        for p, value in zip(parameters, best, strict=True):
            p.copy_(value)
    return Learned(first, best_loss)


def split(batches: int) -> tuple[list[int], list[int]]:
    """Indices to learn from and to hold out; a single batch serves for both."""
    if batches == 1:
        return [0], [0]
    held_out = list(range(min(HELD_OUT, batches) // 2, batches, HELD_OUT))
    return [i for i in range(batches) if i not in held_out], held_out


def _groups(linears: Sequence[Trainable], rates: Rates) -> list[dict[str, Any]]:
    """Adam's step is its rate whatever the gradient's size, so that each parameter has its unit."""
    groups: list[dict[str, Any]] = []

    def add(parameter: Tensor | None, rate: float) -> None:
        if parameter is not None and rate > 0:
            groups.append({"params": [parameter.requires_grad_()], "lr": rate, "first": rate})

    for linear in linears:
        add(linear.offset, rates.offset)
        add(linear.log_scale, rates.scale)
        add(linear.log_input_scale, rates.scale)
        add(linear.input_zero_point, rates.zero_point)
        size = 0.0 if linear.bias is None else float(linear.bias.detach().abs().mean())
        add(linear.bias, rates.scale * max(size, 1e-3))
    return groups


def _batch(indices: list[int], step: int, seed: int) -> int:
    """Every epoch all batches in another order, known from the step alone, as resuming needs."""
    epoch, place = divmod(step, len(indices))
    generator = torch.Generator().manual_seed(_seed(seed, epoch))
    return indices[int(torch.randperm(len(indices), generator=generator)[place])]


def _draw_from(task: Task, step: int) -> None:
    """What is dropped in a step depends on the seed and the step alone, as resuming needs."""
    device = task.linears[0].offset.device if task.linears else "cpu"
    generator = torch.Generator(device).manual_seed(_seed(task.seed, step))
    for linear in task.linears:
        linear.generator = generator


def _seed(seed: int, count: int) -> int:
    return (seed * 1_000_003 + count) % 2**63


@torch.no_grad()
def _held_out_loss(task: Task, held_out: list[int]) -> float:
    """Mean over the held-out batches, nothing dropped."""
    kept = [linear.kept for linear in task.linears]
    for linear in task.linears:
        linear.kept = 1.0
    losses = [float(task.loss(i)) for i in held_out]
    for linear, share in zip(task.linears, kept, strict=True):
        linear.kept = share
    return sum(losses) / len(losses)


def _state(
    optimizer: torch.optim.Adam, parameters: list[Tensor], best: list[Tensor], done: int,
    since: int, first: float, loss: float,
) -> dict[str, Tensor]:  # fmt: skip
    """Everything that the descent goes on from."""
    state = {"done": torch.tensor(done), "since": torch.tensor(since)}
    state["first"] = torch.tensor(first, dtype=torch.float64)
    state["loss"] = torch.tensor(loss, dtype=torch.float64)
    for i, (p, value) in enumerate(zip(parameters, best, strict=True)):
        kept = optimizer.state[p]
        parts = {
            "now": p.detach(),
            "best": value,
            "mean": kept["exp_avg"],
            "square": kept["exp_avg_sq"],
        }
        state |= {f"{name}.{i}": part.clone() for name, part in parts.items()}
    return state


@torch.no_grad()
def _restore(
    state: dict[str, Tensor], optimizer: torch.optim.Adam, parameters: list[Tensor],
    best: list[Tensor],
) -> tuple[int, int, float, float]:  # fmt: skip
    """Sets what the state says; returns steps done, checks since the best, and both losses."""
    for i, p in enumerate(parameters):
        p.copy_(state[f"now.{i}"])
        best[i] = state[f"best.{i}"].clone()
        optimizer.state[p] = {
            "step": state["done"].float(), "exp_avg": state[f"mean.{i}"].clone(),
            "exp_avg_sq": state[f"square.{i}"].clone(),
        }  # fmt: skip
    first, loss = float(state["first"]), float(state["loss"])
    return int(state["done"]), int(state["since"]), first, loss
