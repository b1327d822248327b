"""A model as programs of tensors, and what AOTInductor makes of them."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qtk.errors import BackendError, ModelError
from qtk.modules.products.onednn import visible_to_compiler
from qtk.packages.caching import NAMES, PREFILL, STEP, CachedForward
from qtk.packages.package import ROWS, TOKENS, Axes, Signature, Size
from qtk.packages.route import PLAIN
from qtk.tracing import Named, Quietly, example, output_names

TRACED = (3, 33)  # rows and tokens of a program for any size: numbers that are nothing special
PAST, TOTAL = "past", "total"  # axes of a cache and of a mask over it and what follows
FREE = {ROWS, TOKENS, PAST, TOTAL}


@dataclass(frozen=True)
class Program:
    """One way to call a model, tensors in and out, for any size.

    Attributes:
        route: "plain", "prefill" or "step".
    """

    route: str
    module: nn.Module
    signature: Signature

    def batch(self, model: Any, size: Size) -> dict[str, Tensor]:
        """Example inputs."""
        return _batch(model, self.route, size)

    def export(self, model: Any, size: Size | None) -> Any:
        """The `ExportedProgram` for one size, or for any.

        Raises:
            ModelError: PyTorch cannot trace it.
        """
        traced = size or (TRACED[0], TRACED[1] if self.route != STEP else None)
        batch = self.batch(model, traced)
        dynamic, hint = torch.export.Dim.DYNAMIC, torch.export.Dim.STATIC
        free = FREE if size is None else {PAST, TOTAL}
        shapes = tuple(
            {i: dynamic if axis in free else hint for i, axis in enumerate(axes)}
            for axes in self.signature.inputs.values()
        )
        try:
            with torch.no_grad(), visible_to_compiler(), use_cache(model, False), Quietly():
                return torch.export.export(
                    self.module, tuple(batch.values()), dynamic_shapes=(shapes,), strict=False
                )
        except Exception as error:
            raise ModelError(
                f"PyTorch cannot trace {type(model).__name__}: {str(error)[:500]}"
            ) from error


def programs(model: Any, with_cache: bool) -> list[Program]:
    """The ways to call a model that are worth packages.

    Args:
        with_cache: a causal model is called with its cache, by "prefill" and "step", as well.
    """
    found = [_plain(model)]
    if with_cache:
        found += [_cached(model, PREFILL), _cached(model, STEP)]
    return found


def compile_package(program: Any, path: Path, tune: bool) -> None:
    """Writes a .pt2 with the weights in it.

    Args:
        program: an `ExportedProgram`.
        tune: time oneDNN's product and Inductor's templates beside each other for every linear.

    Raises:
        BackendError: no C++ compiler, or it fails.
    """
    check_compiler()
    options = {
        "freezing": True, "max_autotune": tune, "max_autotune_gemm_backends": "CPP,ATEN",
        "autotune_num_choices_displayed": 0,
    }  # fmt: skip
    try:
        with torch.no_grad(), Quietly(), redirect_stderr(WithoutStatistics(sys.stderr)):
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(path), inductor_configs=options
            )
    except Exception as error:
        raise BackendError(f"AOTInductor failed: {str(error)[:500]}") from error


class WithoutStatistics:
    """A stream but for what Inductor writes to it after each choice, whatever it is told."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if text.startswith("Autotune Choices Stats:"):
            return len(text)
        return int(self._stream.write(text))


def check_compiler() -> None:
    """Raises BackendError where there is no C++ compiler."""
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        raise BackendError(
            "compiling needs a C++ compiler: install g++ (apt-get install g++), or name one in the "
            "environment variable CXX; what is compiled runs without it"
        ) from None


def _plain(model: Any) -> Program:
    batch = example(model, *TRACED)
    with use_cache(model, False):
        outputs = output_names(model, batch)
        axes, returns = _observed(model, outputs)
    inputs = {name: _input_axes(name, value) for name, value in batch.items()}
    dtypes = {name: str(value.dtype).removeprefix("torch.") for name, value in batch.items()}
    signature = Signature(inputs, axes, dtypes, returns, _caches(model, batch))
    return Program(PLAIN, Named(model, tuple(batch), outputs).eval(), signature)


def _cached(model: Any, route: str) -> Program:
    layers = int(model.config.num_hidden_layers)
    batch = _batch(model, route, (TRACED[0], TRACED[1] if route == PREFILL else None))
    held: Axes = (ROWS, None, PAST, None)
    if route == PREFILL:
        inputs: dict[str, Axes] = dict.fromkeys(batch, (ROWS, TOKENS))
        tokens: str | None = TOKENS
    else:
        pairs = {f"{what}_{i}": held for i in range(layers) for what in ("key", "value")}
        inputs = {"input_ids": (ROWS, None), "attention_mask": (ROWS, TOTAL),
                  "position_ids": (ROWS, None), **pairs}  # fmt: skip
        tokens = None
    kept: Axes = (ROWS, None, tokens, None)
    outputs: dict[str, Axes] = {"logits": (ROWS, tokens, None)}
    outputs |= {f"{what}_{i}": kept for i in range(layers) for what in ("key", "value")}
    dtypes = {name: str(batch[name].dtype).removeprefix("torch.") for name in inputs}
    with torch.no_grad():
        found = model(input_ids=batch["input_ids"], use_cache=False, return_dict=True)
    signature = Signature(inputs, outputs, dtypes, type(found).__name__)
    return Program(route, CachedForward(model, tuple(inputs), layers).eval(), signature)


@torch.no_grad()
def _batch(model: Any, route: str, size: Size) -> dict[str, Tensor]:
    rows, tokens = size
    batch = example(model, rows, tokens or TRACED[1])
    if route == PLAIN:
        return batch
    mask = batch["attention_mask"]
    positions = (mask.cumsum(1) * mask - 1).clamp(min=0)
    given = {**batch, "position_ids": positions}
    if route == PREFILL:
        return given
    found = CachedForward(model, tuple(given), int(model.config.num_hidden_layers))(*given.values())
    pairs = {
        f"{what}_{i}": found[1 + 2 * i + j]
        for i in range(model.config.num_hidden_layers) for j, what in enumerate(("key", "value"))
    }  # fmt: skip
    return {
        "input_ids": batch["input_ids"][:, :1],
        "attention_mask": torch.cat([mask, mask.new_ones(rows, 1)], 1),
        "position_ids": mask.sum(1, keepdim=True), **pairs,
    }  # fmt: skip


def _input_axes(name: str, value: Tensor) -> Axes:
    middle: Axes = (None,) * (value.dim() - 2)
    return (ROWS, *middle, None if name == "pixel_values" else TOKENS)


@torch.no_grad()
def _observed(model: Any, outputs: tuple[str, ...]) -> tuple[dict[str, Axes], str]:
    """Which axes of the outputs are rows and tokens: those that change with them."""
    shapes, returns = [], ""
    for size in ((2, 5), (3, 5), (2, 7)):
        found = model(**example(model, *size), return_dict=True)
        shapes.append({name: found[name].shape for name in outputs})
        returns = type(found).__name__
    base, rows, tokens = shapes
    axes: dict[str, Axes] = {}
    for name, shape in base.items():
        axes[name] = tuple(
            ROWS if rows[name][i] != n else TOKENS if tokens[name][i] != n else None
            for i, n in enumerate(shape)
        )
    return axes, returns


@torch.no_grad()
def _caches(model: Any, batch: dict[str, Tensor]) -> bool:
    """Whether it returns a cache where its config says so; encoders never do."""
    with use_cache(model, True):
        found = model(**batch, return_dict=True)
    return any(name in found for name in NAMES)


@contextmanager
def use_cache(model: Any, wanted: bool) -> Iterator[None]:
    """Inside, the model is called with or without its cache, unless a call says otherwise."""
    config = model.config
    before = getattr(config, "use_cache", None)
    try:
        if before is not None:
            config.use_cache = wanted
        yield
    finally:
        if before is not None:
            config.use_cache = before


def shown(size: Size | None) -> str:
    """A size for a progress bar or a message."""
    if size is None:
        return "any size"
    return "x".join(str(n) for n in size if n is not None)
