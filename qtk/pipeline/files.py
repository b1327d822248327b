"""quantize_files(): from a folder to a folder, with one block in memory at a time."""

import tempfile
from pathlib import Path
from typing import Any

import torch

from qtk import integrity
from qtk.errors import SchemeError
from qtk.integrations.offload import open_empty, save_blockwise
from qtk.integrations.transformers import refuse_saving
from qtk.models import describe
from qtk.modules.base import resolve_backend
from qtk.pipeline import calibration, carried_out
from qtk.pipeline.assign import assign
from qtk.pipeline.progress import progress_bar
from qtk.pipeline.request import DEFAULTS, Request
from qtk.pipeline.state import State, check, identity

WHOLE = (
    "{} looks at the whole model at once, which does not go block by block; choose another, such "
    "as method='os+', or quantize in memory"
)


def quantize_files(
    model: str | Path, out: str | Path, w: int | str = 8, a: int | str = 8, calib: Any = None,
    tokenizer: Any = None, *, dtype: torch.dtype | None = None, backend: str = "auto",
    resume: str | Path | None = None, seed: int = 0, progress: bool = True, **options: Any,
) -> list[str]:  # fmt: skip
    """Quantizes the model of a folder into another one, as `quantize` does, a block at a time.

    The memory held is what lies outside the blocks, one block (twice), and the calibration data's
    hidden states. On the CPU.

    Args:
        model: a folder with .safetensors; smaller shards need less memory.
        out: the folder to save into, tokenizer included; replaced as a whole.
        dtype: that the weights are read as; None for the files'.
        options: as `quantize` takes them. Not what looks at all blocks at once: learn="model",
            bits="auto", ranges="hessian", and rotations that are merged into the weights.

    Returns:
        The names of the files that came along: tokenizer and its like.

    Raises:
        QtkError: as `quantize`, and where a part needs the whole model.
    """
    if unknown := sorted(set(options) - set(DEFAULTS)):
        raise SchemeError(f"no option {', '.join(unknown)}; there is {', '.join(DEFAULTS)}")
    if isinstance(options.get("bits"), str):
        raise SchemeError(WHOLE.format("bits='auto'"))
    request = Request.of(w, a, calib, seed=seed, **{**DEFAULTS, **options})
    folder = check(resume)
    qmodel, shards = open_empty(model, dtype)
    blocks = describe(qmodel)
    if not blocks[0].follows:
        raise SchemeError(WHOLE.format("a network of convolutions"))
    resolve_backend(next(qmodel.parameters()), backend)
    found = assign(qmodel, blocks, request.default, request.overrides)
    request.check(found)
    _refuse_the_whole(request, [choice.recipe for choice in found.quantized.values()])
    batches = calibration(qmodel, calib, tokenizer, request, found)
    refuse_saving(qmodel)
    with tempfile.TemporaryDirectory(prefix=".qtk-", dir=_beside(out)) as scratch:
        place, sums = (folder, shards.sums()) if folder else (Path(scratch) / "blocks", {})
        state = State.open(place, identity(sums, request, batches, backend))
        with progress_bar(progress) as bar:
            carried_out(
                qmodel, qmodel, blocks, batches, request, found, backend, bar, state, shards
            )
        files = [(block, state.file(i)) for i, block in enumerate(blocks)]
        sources = [model] if tokenizer is None else [model, tokenizer]
        copied = save_blockwise(qmodel, files, out, sources)
    return copied


def _refuse_the_whole(request: Request, recipes: list[Any]) -> None:
    """Raises SchemeError for what looks at all blocks at once."""
    wrong = {
        "learn='model'": request.learn == "model",
        "ranges='hessian'": any(recipe.needs_gradients for recipe in recipes),
        f"method={request.default.recipe.method!r}": request.default.recipe.transform.merge,
    }
    for what, asked in wrong.items():
        if asked:
            raise SchemeError(WHOLE.format(what))


def _beside(out: str | Path) -> Path:
    """The folder that finished blocks wait in: on the disk that they will stay on."""
    parent = Path(out).resolve().parent
    parent.mkdir(parents=True, exist_ok=True)
    integrity.sync(parent)
    return parent
