"""Who may import whom. A row a package; what is not listed is forbidden."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

LOW = {"qtk.hadamard", "qtk.errors", "qtk.discover", "qtk.scheme", "qtk.numerics", "qtk.grids"}
LOW |= {"qtk.models"}
CORE = LOW | {"qtk.observe", "qtk.transform", "qtk.ranges", "qtk.round", "qtk.modules"}
ALLOWED = {
    "qtk_kernels": {"qtk_kernels"},
    "qtk.errors": set(),
    "qtk.discover": {"qtk.errors"},
    "qtk.scheme": {"qtk.errors"},
    "qtk.numerics": {"qtk.scheme"},
    "qtk.grids": {"qtk.errors", "qtk.hadamard", "qtk.numerics", "qtk.scheme"},
    "qtk.hadamard": {"qtk_kernels"},  # the matrix is defined beside the kernel that applies it
    "qtk.models": {"qtk.discover", "qtk.errors", "qtk.models"},
    "qtk.observe": {"qtk.errors", "qtk.models", "qtk.observe"},
    "qtk.transform": LOW | {"qtk.observe", "qtk.transform"},
    "qtk.ranges": LOW | {"qtk.ranges"},
    "qtk.round": LOW | {"qtk.round"},
    "qtk.modules": LOW | {"qtk.modules", "qtk_kernels"},
    "qtk.recipes": {"qtk.discover", "qtk.errors", "qtk.scheme"},
    "qtk.assign": LOW | {"qtk.observe"},
    "qtk.attend": CORE,
    "qtk.checkpoint": LOW | {"qtk.modules"},
    "qtk.integrations": LOW | {"qtk.checkpoint"},
    "qtk.reconstruct": CORE,
    "qtk.layers": CORE | {"qtk.assign", "qtk.recipes"},
    "qtk.progress": {"qtk.observe"},
    "qtk.sensitivity": CORE | {"qtk.reconstruct"},
    "qtk.pipeline": CORE
    | {
        "qtk.reconstruct",
        "qtk.layers",
        "qtk.progress",
        "qtk.sensitivity",
        "qtk.assign",
        "qtk.attend",
        "qtk.recipes",
        "qtk.checkpoint",
        "qtk.integrations",
        "qtk",
    },
    "qtk.fidelity": CORE | {"qtk.fidelity"},
    "qtk.report": LOW | {"qtk.checkpoint", "qtk.integrations", "qtk.fidelity", "qtk.report"},
}
FREE = ("qtk", "qtk.cli", "qtk.demo", "qtk.__main__")  # the face: may import everything


def sources() -> list[Path]:
    return sorted([*ROOT.glob("qtk/**/*.py"), *ROOT.glob("kernels/qtk_kernels/*.py")])


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    parts = parts[1:] if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_of(module: str) -> str:
    return "qtk_kernels" if module.startswith("qtk_kernels") else ".".join(module.split(".")[:2])


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = module_name(path).rsplit(".", node.level)[0]
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names if base == "qtk"}
    return {name for name in found if name.split(".")[0] in ("qtk", "qtk_kernels")}


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_imports_point_down(path: Path) -> None:
    package = package_of(module_name(path))
    if package in FREE:
        return
    wrong = {name for name in imports(path) if package_of(name) not in ALLOWED[package] | {"qtk"}}
    assert not wrong, f"{module_name(path)} may not import {sorted(wrong)}"


def test_parts_of_one_stage_do_not_import_each_other() -> None:
    for stage in ("transform", "round"):
        for path in (ROOT / "qtk" / stage).glob("*.py"):
            shared = f"qtk.{stage}._"  # what several parts stand on
            same = {n for n in imports(path) if n.startswith(f"qtk.{stage}.")}
            same = {n for n in same if not n.startswith(shared)}
            assert not same, f"{path.name} imports {same}"


def test_only_modules_touch_kernels() -> None:
    for path in (ROOT / "qtk").rglob("*.py"):
        used = {name for name in imports(path) if name.startswith("qtk_kernels")}
        if path.name == "hadamard.py":
            assert used == {"qtk_kernels.hadamard"}  # plain PyTorch
        elif used:
            assert "modules" in path.parts, path


def test_no_folder_called_kernels_is_a_package() -> None:
    """HuggingFace ships a package of that name, which transformers probes for."""
    assert not [p for p in ROOT.rglob("kernels/__init__.py") if ".venv" not in p.parts]
