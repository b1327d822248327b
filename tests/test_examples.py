"""The examples run as they stand, on small models; so does the code in the README."""

import importlib.util
import re
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from qtk.demo.sentences import sentences

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted(ROOT.glob("examples/*.py"))


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result: Any = load(path).main()
    if isinstance(result, torch.Tensor):
        assert result.diagonal() == pytest.approx(torch.ones(len(result)), abs=1e-4)
    else:
        assert result.cosine > 0.8
    assert capsys.readouterr().out.strip()


def test_example_takes_a_path(tiny_bert: Path) -> None:
    cosines = load(ROOT / "examples" / "bert_embeddings.py").main(str(tiny_bert))
    assert cosines.shape == (4, 4)


def test_readme_code_runs(tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    assert len(blocks) >= 5
    (tmp_path / "sentences.txt").write_text("\n".join(sentences(24)))
    (tmp_path / "tests.txt").write_text("\n".join(sentences(24, seed=1)))
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    for block in blocks:
        code = block.replace("sentence-transformers/all-MiniLM-L6-v2", str(tiny_bert))
        exec(compile(code, "README.md", "exec"), namespace)


def test_readme_tables_are_those_of_the_result_files() -> None:
    tables = load(ROOT / "benchmarks" / "readme_tables.py")
    assert tables.main(check=True) == 0, "run python benchmarks/readme_tables.py"


def test_tables_are_made_of_result_files(tmp_path: Path) -> None:
    tables = load(ROOT / "benchmarks" / "readme_tables.py")
    text = f"a\n{tables.BEGIN}\nold\n{tables.END}\nb\n"
    assert "Nothing has been measured" in tables.insert(text, tmp_path)
    (tmp_path / "x.json").write_text(
        '{"title": "T", "hardware": "H", "versions": {"torch": "2"}, "columns": ["a", "b"],'
        ' "rows": [["x|y", 1]], "notes": "N.", "commit": "abc"}'
    )
    (tmp_path / "other.json").write_text('{"a": 1}')
    made = tables.insert_all(text, tmp_path)
    assert "old" not in made and made.startswith("a\n") and made.endswith("\nb\n")
    assert "**T**\n\n| a | b |\n| --- | ---: |\n| x&#124;y | 1 |\n" in made
    assert "<sub>N. H. torch 2. Commit abc.</sub>" in made
    assert tables.insert_all(made, tmp_path) == made
    assert "Nothing has been measured" in tables.insert(text, tmp_path)  # not a headline


def test_what_a_gpu_measured_gets_its_tables_and_what_none_did_is_said(tmp_path: Path) -> None:
    tables = load(ROOT / "benchmarks" / "readme_tables.py")
    text = f"a\n{tables.BEGIN}\nold\n{tables.END}\nb\n"
    for name in ("aot.csv", "aot_attention.csv"):
        shutil.copy(ROOT / "benchmarks" / "results" / name, tmp_path)
    pages = (tables.insert, tables.insert_all, tables.insert_kernels)
    for page in pages:
        assert page(text, tmp_path).count("Speed on a GPU: **not measured**") == 1
    for name in tables.ON_A_GPU:
        (tmp_path / f"{name}.json").write_text(
            f'{{"title": "{name}", "hardware": "H", "versions": {{"torch": "2"}},'
            ' "columns": ["a"], "rows": [["1"]], "notes": "N"}'
        )
    for page in pages:
        made = page(text, tmp_path)
        assert "not measured" not in made and "**gpu_models**" in made and "**gpu_kernels**" in made
    assert "**gpu_slower**" in tables.insert_all(text, tmp_path)


def test_examples_are_short() -> None:
    for path in EXAMPLES:
        body = path.read_text(encoding="utf-8").split("def main", 1)[1]
        assert len(body.splitlines()) <= 26, path.name
