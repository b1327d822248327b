"""Learning what was rounded: one descent for a block and for a whole model."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

HELD_OUT = 8  # one batch in so many is not learned from, and decides when to stop
PATIENCE = 4  # checks in a row without a lower held-out loss that end the descent


class Trainable(Protocol):
    """What can be learned of one linear layer (`qtk.modules.trainable.TrainableLinear`)."""

    kept: float

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
        report: called with (steps done, steps in all, loss on held-out batches).
        keep: called now and then with a state to keep, which `state` may bring back later.
    """

    linears: Sequence[Trainable]
    loss: Callable[[int], Tensor]
    batches: int
    seed: int = 0
    report: Callable[[int, int, float], None] = lambda done, total, loss: None
    keep: Callable[[dict[str, Tensor]], None] | None = None
    state: dict[str, Tensor] = field(default_factory=dict)


def descend(task: Task, steps: int, rates: Rates, checks: int) -> float:
    """Adam on straight-through gradients; leaves the best parameters that the held-out batches saw.

    Those include the first, so that the held-out loss never rises. Returns it. Ends early when it
    has not fallen for PATIENCE checks.

    Args:
        steps: batches that are learned from.
        checks: how often the held-out loss is taken, and the state kept.
    """
    groups = _groups(task.linears, rates)
    parameters = [p for group in groups for p in group["params"]]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    learned_from, held_out = split(task.batches)
    done, since, best = 0, 0, [p.detach().clone() for p in parameters]
    if task.state:
        done, since, best_loss = _restore(task.state, optimizer, parameters, best)
    else:
        best_loss = _held_out_loss(task, held_out)
    task.report(done, steps, best_loss)
    every = max(steps // checks, 1)
    for step in range(done, steps):
        if since >= PATIENCE:
            break
        for group in optimizer.param_groups:
            group["lr"] = group["first"] * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        with _seeded(task.seed * 1_000_003 + step), torch.enable_grad():
            loss = task.loss(_batch(learned_from, step, task.seed))
            loss.backward()
        optimizer.step()
        if (step + 1) % every == 0 or step + 1 == steps:
            now = _held_out_loss(task, held_out)
            since += 1
            if now < best_loss:
                best_loss, best, since = now, [p.detach().clone() for p in parameters], 0
            task.report(step + 1, steps, best_loss)
            if task.keep is not None and step + 1 < steps:
                task.keep(_state(optimizer, parameters, best, step + 1, since, best_loss))
    with torch.no_grad():
        for p, value in zip(parameters, best, strict=True):
            p.copy_(value)
    return best_loss


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
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return indices[int(torch.randperm(len(indices), generator=generator)[place])]


class _seeded:
    """What is drawn inside depends on the seed alone, and the generator outside stays as it was."""

    def __init__(self, seed: int) -> None:
        self.fork, self.seed = torch.random.fork_rng(devices=[]), seed

    def __enter__(self) -> None:
        self.fork.__enter__()
        torch.manual_seed(self.seed)

    def __exit__(self, *error: Any) -> None:
        self.fork.__exit__(*error)


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
    since: int, loss: float,
) -> dict[str, Tensor]:  # fmt: skip
    """Everything that the descent goes on from."""
    state = {"done": torch.tensor(done), "since": torch.tensor(since)}
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
) -> tuple[int, int, float]:  # fmt: skip
    for i, p in enumerate(parameters):
        p.copy_(state[f"now.{i}"])
        best[i] = state[f"best.{i}"].clone()
        optimizer.state[p] = {
            "step": state["done"].float(), "exp_avg": state[f"mean.{i}"].clone(),
            "exp_avg_sq": state[f"square.{i}"].clone(),
        }  # fmt: skip
    return int(state["done"]), int(state["since"]), float(state["loss"])
