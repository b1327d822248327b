"""Compiles a quantized model ahead of time: one package of native code a size.

sizes ──> program.py: torch.export, AOTInductor ──> packages ──> times ──> a served model
"""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from qtk.compiler.program import (
    Program,
    check_compiler,
    compile_package,
    programs,
    shown,
    use_cache,
)
from qtk.compiler.sizes import DEFAULT, checked
from qtk.errors import BackendError, SchemeError
from qtk.integrations import sentence_transformers
from qtk.integrations.transformers import attach, record_of
from qtk.packages.bundle import Bundle
from qtk.packages.caching import STEP
from qtk.packages.package import Package, Size
from qtk.packages.route import Route, Timing
from qtk.packages.served import ServedModel, serve
from qtk.pipeline.progress import progress_bar
from qtk.timing import race


def compile(
    model: Any, sizes: Iterable[Any] | None = None, *, dynamic: bool = True, tune: bool = True,
    progress: bool = True,
) -> Any:  # fmt: skip
    """Compiles a quantized model for this CPU, ahead of time: no Python between its operations.

    Each size becomes a package of native code in which oneDNN's products and Inductor's own
    templates were timed beside each other; a call is served by the package that is expected to be
    the fastest at its size, padded where that pays, or by the model as it was where that is faster.
    Outputs are the quantized model's, but for codes that stood between two values. So are calls
    that packages do not know: gradients, attention maps, hooks, labels.

    Args:
        model: what `qtk.quantize` returned, on a CPU; or a SentenceTransformer or CrossEncoder
            around such a model.
        sizes: pairs of rows and tokens, for images numbers of rows; by default one row of 16, 32,
            64 and 128 tokens, or one image.
        dynamic: one more package, for any other size.
        tune: time the ways to multiply; without, it compiles faster and runs slower.
        progress: a bar on the terminal. A package takes a minute or so.

    Returns:
        A model of the same class that shares its weights with the given one. `save_pretrained`
        keeps the packages beside the weights, and `qtk.load(..., compiled=True)` uses them on CPUs
        of the same kind with the same PyTorch, without a compiler.

    Raises:
        ModelError: not a quantized model, or PyTorch cannot trace it.
        SchemeError: no sizes, what is no size, or that the model has no positions for.
        BackendError: not on a CPU, no C++ compiler, or it fails.
    """
    inner = sentence_transformers.transformers_model(model)
    source = model if inner is None else inner
    record_of(source)
    check(source)
    wanted: list[Size | None] = [*checked(source, DEFAULT if sizes is None else sizes)]
    if dynamic:
        wanted.append(None)
    if not wanted:
        raise SchemeError("nothing to compile: give sizes, or dynamic=True")
    check_compiler()
    plain: Any = _plain(source)
    was_training = plain.training
    try:
        bundle = _bundle(plain.eval(), wanted, tune, progress)
    finally:
        plain.train(was_training)
    served = serve(source, bundle)
    attach(served, record_of(source))
    return sentence_transformers.rewrap(model, served)


def check(model: Any) -> None:
    """Raises BackendError for a model that is not on a CPU, or made for a GPU's kernels."""
    where = next(model.parameters()).device
    if where.type != "cpu":
        raise BackendError(
            f"the model is on {where}; packages are for CPUs: model.to('cpu'), or torch.compile"
        )
    if record_of(model).backend == "triton":
        raise BackendError(
            "the model was made for backend='triton'; quantize or load it with backend='auto'"
        )
    if hasattr(model, "qtk_on_disk"):
        raise BackendError("blocks of the model are on disk; load it whole to compile it")


def _plain(model: Any) -> Any:
    """The model without packages."""
    if not isinstance(model, ServedModel):
        return model
    bare: Any = serve(model, Bundle({}))
    bare.qtk_packages = None
    return bare


def _bundle(model: Any, sizes: list[Size | None], tune: bool, progress: bool) -> Bundle:
    routes = programs(model, bool(getattr(model.config, "use_cache", False)) and _is_causal(model))
    jobs = [(p, size) for p in routes for size in _sizes(p, sizes)]
    home = tempfile.TemporaryDirectory(prefix="qtk-packages-")
    packages: dict[str, list[Package]] = {program.route: [] for program in routes}
    with progress_bar(progress) as bar:
        for done, (program, size) in enumerate(jobs):
            bar.show(f"compiling {program.route} {shown(size)}", done, len(jobs) + 1)
            path = Path(home.name) / f"{program.route}-{done}.pt2"
            compile_package(program.export(model, size), path, tune)
            packages[program.route].append(Package(path, size, home))
        bar.show("timing", len(jobs), len(jobs) + 1)
        return Bundle({p.route: _route(model, p, packages[p.route]) for p in routes})


def _sizes(program: Program, sizes: list[Size | None]) -> list[Size | None]:
    """A step reads one token a row, whatever the length of what is before it."""
    if program.route != STEP:
        return sizes
    rows = sorted({size[0] for size in sizes if size is not None})
    return [*((n, None) for n in rows), *([None] if None in sizes else [])]


def _route(model: Any, program: Program, packages: list[Package]) -> Route:
    pad_id = int(getattr(model.config, "pad_token_id", None) or 0)
    timings = [_timed(model, program, packages, size) for size in _measured(program, packages)]
    return Route(program.signature, packages, timings, pad_id)


def _measured(program: Program, packages: list[Package]) -> list[Size]:
    static = [package.size for package in packages if package.size is not None]
    if static:
        return static
    return [(1, 16), (4, 64)] if "input_ids" in program.signature.inputs else [(1, None)]


def _timed(model: Any, program: Program, packages: list[Package], size: Size) -> Timing:
    """The packages for a size beside the model itself."""
    batch = program.batch(model, size)
    inputs = [batch[name].contiguous() for name in program.signature.inputs]
    calls: dict[str, Any] = {"eager": lambda: program.module(*inputs)}
    for package in packages:
        if package.size in (size, None):
            name = "dynamic" if package.size is None else "static"
            calls[name] = lambda package=package: package(inputs)
    with use_cache(model, False), torch.no_grad():
        found = race(calls, limit=5)
    return Timing(size, found["eager"], found.get("static"), found.get("dynamic"))


def _is_causal(model: Any) -> bool:
    return type(model).__name__.endswith("ForCausalLM")


__all__ = ["check", "compile"]
