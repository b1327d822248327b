"""The folder is the registry: a part is named by its file.

    qtk/round/gptq.py  is  load("round", "gptq")

Adding a file adds the part; there is no table to edit. A file that starts with _ is not a part.
"""

from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType

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
