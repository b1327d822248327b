"""Who may import whom. A row a package; what is not listed is forbidden."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

LOW = {f"qtk.{name}" for name in (
    "errors", "discover", "scheme", "numerics", "grids", "models", "integrity", "ranks", "windows",
)}  # fmt: skip
STAGES = {"qtk.transform", "qtk.ranges", "qtk.round"}
ALLOWED = {
    "qtk_kernels": {"qtk_kernels"},
    "qtk.errors": set(),
    "qtk.discover": {"qtk.errors"},
    "qtk.scheme": {"qtk.errors"},
    "qtk.integrity": {"qtk.errors"},
    "qtk.ranks": {"qtk.errors"},
    "qtk.table": set(),
    "qtk.windows": set(),
    "qtk.timing": set(),
    "qtk.intervals": set(),
    "qtk.numerics": {"qtk.scheme"},
    "qtk.grids": {"qtk.errors", "qtk.numerics", "qtk.scheme"},
    "qtk.models": {"qtk.discover", "qtk.errors", "qtk.models"},
    "qtk.observe": {"qtk.errors", "qtk.models", "qtk.observe", "qtk.ranks", "qtk.windows"},
    "qtk.transform": LOW | {"qtk.observe", "qtk.transform"},
    "qtk.ranges": LOW | {"qtk.ranges"},
    "qtk.round": LOW | {"qtk.round"},
    "qtk.modules": LOW | {"qtk.modules", "qtk_kernels"},
    "qtk.learn": LOW | {"qtk.observe", "qtk.modules", "qtk.learn"},
    "qtk.record": {"qtk.errors", "qtk.scheme"},
    "qtk.assembly": LOW | {"qtk.modules", "qtk.record"},
    "qtk.tracing": {"qtk.observe"},
    "qtk.packages": {"qtk.errors", "qtk.integrity", "qtk.tracing", "qtk.modules", "qtk.packages"},
    "qtk.integrations": LOW
    | {"qtk.modules", "qtk.record", "qtk.assembly", "qtk.packages", "qtk.integrations"},
    "qtk.compiler": {
        "qtk.errors",
        "qtk.modules",
        "qtk.tracing",
        "qtk.packages",
        "qtk.integrations",
        "qtk.pipeline",
        "qtk.timing",
        "qtk.compiler",
    },
    "qtk.pipeline": LOW
    | STAGES
    | {
        "qtk.observe",
        "qtk.modules",
        "qtk.learn",
        "qtk.record",
        "qtk.assembly",
        "qtk.integrations",
        "qtk.pipeline",
    },
    "qtk.mixed_precision": LOW
    | {
        "qtk.observe",
        "qtk.integrations",
        "qtk.modules",
        "qtk.learn",
        "qtk.pipeline",
        "qtk.fidelity",
        "qtk.report",
        "qtk.table",
        "qtk.timing",
        "qtk.mixed_precision",
    },
    "qtk.fidelity": LOW
    | {"qtk.observe", "qtk.modules", "qtk.integrations", "qtk.table", "qtk.fidelity"},
    "qtk.fair": LOW
    | {
        "qtk.observe",
        "qtk.fidelity",
        "qtk.intervals",
        "qtk.pipeline",
        "qtk.report",
        "qtk.table",
        "qtk.fair",
    },
    "qtk.physical": LOW
    | {
        "qtk.fidelity",
        "qtk.intervals",
        "qtk.pipeline",
        "qtk.report",
        "qtk.robust",
        "qtk.table",
        "qtk.physical",
    },
    "qtk.robust": LOW
    | {
        "qtk.observe",
        "qtk.modules",
        "qtk.assembly",
        "qtk.integrations",
        "qtk.fidelity",
        "qtk.report",
        "qtk.table",
        "qtk.intervals",
        "qtk.robust",
    },
    "qtk.formats": LOW
    | {
        "qtk.observe",
        "qtk.modules",
        "qtk.assembly",
        "qtk.integrations",
        "qtk.table",
        "qtk.tracing",
        "qtk.packages",
        "qtk.compiler",
        "qtk.formats",
    },
    "qtk.report": LOW
    | {
        "qtk.record",
        "qtk.modules",
        "qtk.assembly",
        "qtk.packages",
        "qtk.integrations",
        "qtk.table",
        "qtk.report",
    },
    "qtk.security": LOW
    | {
        "qtk.round",
        "qtk.observe",
        "qtk.modules",
        "qtk.fidelity",
        "qtk.pipeline",
        "qtk.integrations",
        "qtk.report",
        "qtk.table",
        "qtk.intervals",
        "qtk.security",
    },
    "qtk.sweep": LOW
    | {
        "qtk.api",
        "qtk.observe",
        "qtk.integrations",
        "qtk.pipeline",
        "qtk.fidelity",
        "qtk.report",
        "qtk.timing",
        "qtk.sweep",
    },
}
# Inside these, a file imports only what stands before it.
ORDER = {
    "fair": [
        "__init__", "domain", "answer", "groups", "result", "sides", "decoder", "rows", "census",
        "classifier", "retrain", "text", "compare",
    ],
    "formats": [
        "__init__", "_trace", "_layers", "_compare", "onnx", "openvino", "compressed_tensors",
        "gguf", "aoti",
    ],
    "integrations": [
        "__init__", "companions", "quiet", "replacement", "folder", "card", "hub", "networks",
        "saving", "offload", "sentence_transformers", "compressed_tensors", "transformers",
    ],
    "packages": ["__init__", "package", "route", "caching", "bundle", "served"],
    "compiler": ["sizes", "program", "__init__"],
    "sweep": ["__init__", "plan", "cell", "engine", "table", "page"],
    "observe": [
        "guard", "probe", "site", "walk", "imagine", "gradients", "__init__", "trace", "beside",
        "files", "images", "items", "tokens", "check", "batches",
    ],
    "learn": ["__init__", "descent", "objective", "resume", "trainable", "block", "model"],
    "pipeline": [
        "progress", "recipes", "assign", "attention", "request", "site", "learning", "state",
        "keeper", "__init__", "files",
    ],
    "mixed_precision": [
        "__init__", "budget", "space", "allocate", "loss", "synthetic", "latency", "sensitivity",
        "auto", "result", "costs", "data", "verify", "search",
    ],
}  # fmt: skip
PLAIN = "qtk_kernels.hadamard"  # the definition of a matrix, in PyTorch: whoever needs it
FREE = (  # the face: may import everything
    "qtk", "qtk.api", "qtk.cli", "qtk.commands", "qtk.demo", "qtk.__main__",
)  # fmt: skip


def sources() -> list[Path]:
    return sorted([*ROOT.glob("qtk/**/*.py"), *ROOT.glob("kernels/qtk_kernels/*.py")])


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    parts = parts[1:] if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_of(module: str) -> str:
    return "qtk_kernels" if module.startswith("qtk_kernels") else ".".join(module.split(".")[:2])


def imports(path: Path) -> set[str]:
    """Modules and names of ours that a file imports, by `import` or by `load("stage", ...)`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                folder = module_name(path) if path.name == "__init__.py" else parent_of(path)
                for _ in range(node.level - 1):
                    folder = folder.rpartition(".")[0]
                base = f"{folder}.{base}".rstrip(".")
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and called(node) in ("load", "part", "available"):
            first, *rest = [a.value if isinstance(a, ast.Constant) else None for a in node.args]
            if isinstance(first, str):
                name = rest[0] if rest and isinstance(rest[0], str) else None
                found |= {f"qtk.{first}", f"qtk.{first}.{name}" if name else f"qtk.{first}"}
    return {name for name in found if name.split(".")[0] in ("qtk", "qtk_kernels")}


def parent_of(path: Path) -> str:
    return module_name(path).rpartition(".")[0]


def called(node: ast.Call) -> str | None:
    return getattr(node.func, "id", None) or getattr(node.func, "attr", None)


@pytest.mark.parametrize("source, found", [
    ("from qtk.round import gptq", {"qtk.round", "qtk.round.gptq"}),
    ("import qtk.round.gptq", {"qtk.round.gptq"}),
    ("from . import gptq", {"qtk.round", "qtk.round.gptq"}),
    ("from .gptq import find", {"qtk.round.gptq", "qtk.round.gptq.find"}),
    ("from ..ranges import mse", {"qtk.ranges", "qtk.ranges.mse"}),
    ('load("round", "gptq")', {"qtk.round", "qtk.round.gptq"}),
    ('discover.part("ranges", given)', {"qtk.ranges"}),
    ("def f():\n    from qtk.round import gptq", {"qtk.round", "qtk.round.gptq"}),
    ("import torch", set()),
])  # fmt: skip
def test_no_way_of_importing_is_overlooked(source, found, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "qtk" / "round" / "new.py"
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert imports(path) == found


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_imports_point_down(path: Path) -> None:
    package = package_of(module_name(path))
    if package in FREE:
        return
    found = {name for name in imports(path) if not name.startswith(PLAIN)}
    wrong = {name for name in found if package_of(name) not in ALLOWED[package] | {"qtk"}}
    assert not wrong, f"{module_name(path)} may not import {sorted(wrong)}"


def test_the_design_names_every_layer() -> None:
    text = (ROOT / "DESIGN.md").read_text().split("## Layers", 1)[1].split("## Words", 1)[0]
    missing = [name for name in ALLOWED if f"`{name.removeprefix('qtk.')}`" not in text]
    assert not [name for name in missing if name != "qtk_kernels"] and "qtk_kernels" in text


@pytest.mark.parametrize("folder", ORDER)
def test_files_of_a_package_stand_in_order(folder: str) -> None:
    order, package = ORDER[folder], f"qtk.{folder}"
    assert sorted(order) == sorted(p.stem for p in (ROOT / "qtk" / folder).glob("*.py"))
    for place, name in enumerate(order):
        later = {f"{package}.{n}" for n in order[place + 1 :]}
        if place < order.index("__init__"):
            later |= {package}
        found = imports(ROOT / "qtk" / folder / f"{name}.py")
        submodules = {".".join(n.split(".")[:3]) for n in found}
        assert not submodules & later, f"{package}.{name} imports {sorted(submodules & later)}"


def test_parts_of_one_stage_do_not_import_each_other() -> None:
    for stage in ("transform", "ranges", "round"):
        files = {path.stem for path in (ROOT / "qtk" / stage).glob("*.py")}
        parts = {f"qtk.{stage}.{name}" for name in files if not name.startswith("_")}
        for path in (ROOT / "qtk" / stage).glob("*.py"):
            same = imports(path) & parts  # files that start with _ are what several stand on
            assert not same, f"{path.name} imports {same}"


def test_what_starts_with_an_underscore_stays_in_its_folder() -> None:
    for path in (ROOT / "qtk").rglob("*.py"):
        for name in imports(path):
            folder, _, last = name.rpartition(".")
            if name.startswith("qtk.") and last.startswith("_") and "__" not in last:
                assert (ROOT / Path(*folder.split("."))) == path.parent, f"{path.name}: {name}"


def test_only_modules_touch_kernels() -> None:
    for path in (ROOT / "qtk").rglob("*.py"):
        used = {name for name in imports(path) if name.startswith("qtk_kernels")}
        if any(not name.startswith(PLAIN) for name in used):
            assert "modules" in path.parts, path


def test_no_folder_called_kernels_is_a_package() -> None:
    """HuggingFace ships a package of that name, which transformers probes for."""
    assert not [p for p in ROOT.rglob("kernels/__init__.py") if ".venv" not in p.parts]
