"""What `import qtk` gives, and what it costs."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import qtk

ROOT = Path(__file__).resolve().parents[1]
PATHS = [str(ROOT), str(ROOT / "kernels")]


@pytest.mark.parametrize("name", qtk.__all__)
def test_every_public_name_is_there_and_explained(name):
    thing = getattr(qtk, name)
    assert thing.__module__.startswith("qtk.")
    assert inspect.getdoc(thing)


def test_the_list_of_names_is_sorted_and_complete():
    assert list(qtk.__all__) == sorted(qtk.__all__)
    public = {
        name for name, thing in vars(qtk).items()
        if not name.startswith("_") and not inspect.ismodule(thing)
    }  # fmt: skip
    assert public == set(qtk.__all__)


@pytest.mark.parametrize("function", ["quantize", "load"])
def test_every_argument_is_explained(function):
    function = getattr(qtk, function)
    doc = inspect.getdoc(function)
    for name, parameter in inspect.signature(function).parameters.items():
        named = name in doc.replace("\n", " ")
        assert named, f"{function.__name__}: {name} is not in the docstring"
        assert parameter.annotation is not parameter.empty, f"{function.__name__}: {name}"


def test_quantize_is_called_as_documented():
    parameters = inspect.signature(qtk.quantize).parameters
    positional = [n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == ["model", "w", "a", "calib", "tokenizer"]
    assert (parameters["w"].default, parameters["a"].default) == (8, 8)
    assert all(p.default is not p.empty for n, p in parameters.items() if n != "model")


def test_errors_come_from_one_module():
    from qtk import errors

    names = {n for n, e in vars(errors).items() if inspect.isclass(e) and issubclass(e, Exception)}
    assert names <= set(qtk.__all__)


def run(code: str) -> str:
    """Runs code in a process of its own that sees the checkout."""
    command = f"import sys; sys.path[:0] = {PATHS!r}\n{code}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", command], check=True, capture_output=True, text=True, env=environment
    )
    return done.stdout + done.stderr


def test_importing_says_nothing_and_leaves_the_heavy_parts_out():
    told = run(
        "import qtk, torch\n"
        "heavy = {'matplotlib', 'rich', 'typer', 'PIL', 'scipy'} & set(sys.modules)\n"
        "assert heavy <= {'rich', 'scipy', 'PIL'}, heavy\n"
        "assert not [m for m in sys.modules if m.startswith('transformers.models.bert')]\n"
        "assert not torch.cuda.is_initialized()"
    )
    assert told == ""
