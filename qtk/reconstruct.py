"""Learning after rounding: a block, or the whole model, against the float one.

What is learned and how is the rounder's (qtk/round/block.py, qtk/round/tuned.py); here is what it
learns from.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from qtk.errors import CheckpointError
from qtk.modules.trainable import TrainableLinear, trainable
from qtk.numerics import EPS
from qtk.observe import Batch, Call, run
from qtk.round._descent import Task

Report = Callable[[int, int, float], None]


def learns_block(rounder: ModuleType) -> bool:
    """Whether a file in qtk/round learns each block."""
    return hasattr(rounder, "refine_block")


def learns_model(rounder: ModuleType) -> bool:
    """Whether a file in qtk/round learns the whole model."""
    return hasattr(rounder, "refine_model")


def reconstruct_block(
    rounder: ModuleType, module: nn.Module, calls: Sequence[Call], seed: int, report: Report
) -> None:
    """Learns the integer linears of a block, in place.

    Args:
        module: the block; its quantized stream is what `calls` hold as inputs, and the float
            model's output of the same block what they hold as `float_hidden`.
    """

    def loss(i: int) -> Tensor:
        call = calls[i]
        got = run(module, call.hidden, call)
        return relative_error(got[call.mask], call.float_hidden[call.mask])

    with trainable(module) as linears:
        rounder.refine_block(Task(list(linears.values()), loss, len(calls), seed, report))


def reconstruct_model(
    rounder: ModuleType, model: nn.Module, teacher: nn.Module, batches: Sequence[Batch],
    seed: int, report: Report, resume: Path | None = None,
) -> None:  # fmt: skip
    """Learns all integer linears of a model, in place.

    Args:
        teacher: the float model.
        resume: a file that keeps the state now and then, is gone on from when it is there, and
            is removed at the end.

    Raises:
        CheckpointError: `resume` holds the state of another run.
    """

    def loss(i: int) -> Tensor:
        with torch.no_grad():
            wanted = teacher(**batches[i])
        return output_error(model(**batches[i]), wanted, batches[i].get("attention_mask"))

    with trainable(model) as linears:
        task = Task(list(linears.values()), loss, len(batches), seed, report)
        if resume is not None:
            identity = _identity(linears, len(batches), seed)
            task.state = _read(resume, identity)
            task.keep = lambda state: _write(resume, state, identity)
        rounder.refine_model(task)
    if resume is not None:
        resume.unlink(missing_ok=True)


def relative_error(got: Tensor, wanted: Tensor) -> Tensor:
    """Squared error of [T, H] over the variance that its channels have."""
    got, wanted = got.float(), wanted.float()
    return (got - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum().clamp(min=EPS)


def output_error(got: Any, wanted: Any, mask: Tensor | None) -> Tensor:
    """How far a model's outputs are from the float model's: KL of logits, or hidden states' error.

    Args:
        got, wanted: outputs of transformers models of one class.
        mask: [B, T], 0 at padding, or None.
    """
    errors = []
    for name, value in wanted.items():
        mine = got[name]
        if not isinstance(value, Tensor) or name == "loss":
            continue
        per_token = mask is not None and value.shape[:2] == mask.shape
        if per_token and value.dim() == 3:
            assert mask is not None
            mine, value = mine[mask.bool()], value[mask.bool()]
        if name.endswith("logits") and value.shape[-1] > 1:
            log_q, log_p = (F.log_softmax(x.float().flatten(0, -2), -1) for x in (mine, value))
            errors.append(F.kl_div(log_q, log_p, log_target=True, reduction="batchmean"))
        elif name.endswith("logits") or name == "last_hidden_state":
            errors.append(relative_error(mine.flatten(0, -2), value.flatten(0, -2)))
    return torch.stack(errors).sum()


def _identity(linears: dict[str, TrainableLinear], batches: int, seed: int) -> str:
    """Tells one run from another: its layers, where they start, its data and seed."""
    start = [(n, float(m.codes.sum()), float(m.scale.double().sum())) for n, m in linears.items()]
    return hashlib.sha256(json.dumps([start, batches, seed]).encode()).hexdigest()


def _read(path: Path, identity: str) -> dict[str, Tensor]:
    if not path.exists():
        return {}
    try:
        with safe_open(path, "pt") as file:
            same = (file.metadata() or {}).get("identity") == identity
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"resume={str(path)!r} cannot be read: {error}; delete it") from None
    if not same:
        raise CheckpointError(
            f"resume={str(path)!r} is of another model, data, seed or scheme; delete it, or name "
            "another file"
        )
    return state


def _write(path: Path, state: dict[str, Tensor], identity: str) -> None:
    """Whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    save_file(state, part, metadata={"identity": identity})
    os.replace(part, path)
