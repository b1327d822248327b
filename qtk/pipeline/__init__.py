"""run(): the whole method on one page, read from top to bottom."""

import copy
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qtk.assembly import base_name, check_float, finish
from qtk.integrations.transformers import attach, load_float, refuse_saving
from qtk.models import Block, describe, fold_scales
from qtk.modules.base import resolve_backend
from qtk.observe import Batch, Site, imagine, walk
from qtk.observe.batches import prepare
from qtk.observe.gradients import block_gradients
from qtk.pipeline.assign import Assignment, assign
from qtk.pipeline.attention import quantize_attention
from qtk.pipeline.learning import Learning, say_who_disagrees
from qtk.pipeline.progress import progress_bar
from qtk.pipeline.request import Request
from qtk.pipeline.site import quantize_outside, quantize_site
from qtk.record import Layer, Record

logger = logging.getLogger("qtk")

Model = Any  # a transformers model


def run(
    model: nn.Module | str | Path, calib: Any, tokenizer: Any, request: Request, *, backend: str,
    progress: bool, inplace: bool,
) -> Model:  # fmt: skip
    """What `qtk.quantize` does once it is known what every layer becomes.

    Args:
        model, calib, tokenizer, backend, progress, inplace: of `qtk.quantize`.

    Raises:
        QtkError: as `qtk.quantize`.
    """
    source, blocks = opened(model, backend)
    found = assign(source, blocks, request.default, request.overrides)
    request.check(found)
    batches = _data(source, calib, tokenizer, request, found)
    teacher, qmodel = _copies(source, request, inplace)
    with torch.no_grad(), progress_bar(progress) as bar:
        made: dict[str, Layer] = {}
        learning = Learning(request, bar.learning)
        blocks = _merged(qmodel, blocks, request)
        for site in bar.over(_sites(qmodel, blocks, batches, found, learning), blocks):
            for choice, part in found.parts(site):
                made |= quantize_site(qmodel, part, choice, backend)
            quantize_attention(qmodel, site, request.attention, backend)
        made = learning.after_all(qmodel, teacher, batches, made)
        made |= quantize_outside(qmodel, found.outside, backend)
    finish(qmodel)
    layers = {base_name(qmodel, name): layer for name, layer in made.items()}
    told = request.told(batches, learning.told())
    attach(qmodel, Record(layers, told, backend, request.attention))
    return qmodel


def opened(model: nn.Module | str | Path, backend: str) -> tuple[Model, tuple[Block, ...]]:
    """The float model and its blocks.

    Raises:
        ModelError: not a model of a family that is known, already quantized, or not finite.
        BackendError: it cannot run where the model is.
    """
    source = load_float(model)
    blocks = describe(source)
    check_float(source)
    resolve_backend(next(source.parameters()), backend)
    return source, blocks


def _data(
    source: Model, calib: Any, tokenizer: Any, request: Request, found: Assignment
) -> list[Batch] | None:
    """The calibration batches."""
    say_who_disagrees(request, found)
    if calib is not None:
        return prepare(source, calib, tokenizer, request.seed, request.samples)
    if any(choice.scheme.a is not None for choice in found.quantized.values()):
        logger.warning(
            "no calibration data: activations are dynamic per token, and shift and scale come from "
            "the LayerNorms' own parameters. A few hundred unlabelled samples (calib=) do better."
        )
    return None


def _copies(source: Model, request: Request, inplace: bool) -> tuple[Model, Model]:
    """The float model to learn from, and the model to be quantized, which cannot be saved yet."""
    teacher = copy.deepcopy(source).eval() if inplace and request.learn == "model" else source
    qmodel = (source if inplace else copy.deepcopy(source)).eval().requires_grad_(False)
    refuse_saving(qmodel)
    return teacher, qmodel


def _merged(qmodel: Model, blocks: Sequence[Block], request: Request) -> tuple[Block, ...]:
    """The blocks after the default method has moved into the weights what it can, in place."""
    fold_scales(qmodel, blocks)
    merge = request.default.recipe.transform.merge
    if merge is None or request.default.scheme.w is None:
        return tuple(blocks)
    return merge(qmodel, blocks)


def _sites(
    qmodel: Model, blocks: Sequence[Block], batches: Sequence[Batch] | None, found: Assignment,
    learning: Learning,
) -> Iterator[Site]:  # fmt: skip
    """The sites of all blocks, in order; a block may learn once its own are quantized."""
    seed = learning.request.seed
    if batches is None:
        return imagine(qmodel, blocks, seed)
    gradients = None
    if any(choice.recipe.needs_gradients for choice in found.quantized.values()):
        gradients = block_gradients(qmodel, blocks, batches, seed)
    return walk(qmodel, blocks, batches, gradients=gradients, after_block=learning.after_block)
