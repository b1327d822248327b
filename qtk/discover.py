"""The folder is the registry: a part is named by its file, or given as it is.

    qtk/round/gptq.py  is  load("round", "gptq")

Adding a file adds the part; there is no table to edit. A file that starts with _ is not a part. A
user's own part, from anywhere, is a module with a function `find`, or such a function.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

from qtk.errors import SchemeError


def available(folder: str) -> list[str]:
    """The names in one folder, sorted. Imports none of them."""
    package = import_module(f"qtk.{folder}")
    return sorted(m.name for m in iter_modules(package.__path__) if not m.name.startswith("_"))


def load(folder: str, name: str) -> ModuleType:
    """Imports one part by name.

    Raises:
        SchemeError: there is no such file; the message lists those there are.
    """
    if name not in available(folder):
        raise SchemeError(f"no {name!r} in qtk/{folder}; there is: {', '.join(available(folder))}")
    return import_module(f"qtk.{folder}.{name}")


@dataclass(frozen=True)
class Part:
    """One part of a stage, whoever wrote it.

    Attributes:
        name: for records and messages, settings included: "gptq(sweeps=0)".
        find: what it does.
        home: the module or object whose further members the stage's protocol names.
    """

    name: str
    find: Callable[..., Any]
    home: Any

    def member(self, name: str, default: Any) -> Any:
        """An optional member of the stage's protocol."""
        return getattr(self.home, name, default)


def part(folder: str, given: object) -> Part:
    """A part by its name, or a user's: a module (anything with `find`), a function, a partial.

    Raises:
        SchemeError: none of these.
    """
    if isinstance(given, str):
        module = load(folder, given)
        return Part(given, module.find, module)
    if callable(find := getattr(given, "find", None)):
        name = str(getattr(given, "__name__", type(given).__name__))
        return Part(name.rpartition(".")[2], find, given)
    if callable(given):
        function: Any = given
        settings = ""
        if isinstance(given, partial):
            function = given.func
            settings = f"({', '.join(f'{k}={v}'[:60] for k, v in given.keywords.items())})"[:200]
        home = sys.modules.get(getattr(function, "__module__", None) or "", function)
        name = str(getattr(function, "__name__", type(function).__name__))
        if name == "find":
            name = str(getattr(home, "__name__", name)).rpartition(".")[2]
        return Part(name + settings, given, home)
    raise SchemeError(
        f"a {type(given).__name__} is no part of qtk/{folder}: give a name, a module with a "
        f"function `find`, or such a function; there is: {', '.join(available(folder))}"
    )
