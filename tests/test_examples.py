"""The examples run as they stand, on small models; so does the code in the README."""

import importlib.util
import json
import re
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import qtk
from qtk.demo.sentences import sentences
from qtk.discover import available

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted(ROOT.glob("examples/*.py"))
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "kernels" / "README.md",
         ROOT / "benchmarks" / "results" / "README.md"]  # fmt: skip


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(text: str) -> list[str]:
    """The first column of a table."""
    return [re.split(r"\s{2,}", line)[0] for line in text.splitlines()]


def words(text: str) -> list[str]:
    """The lines without their figures, their rules of dashes and their indentation."""
    return [re.sub(r"\d[\d.]*|--+", "#", " ".join(line.split())) for line in text.splitlines()]


@pytest.mark.usefixtures("minilm_path")
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_prints_what_its_docstring_shows(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example = load(path)
    example.main()
    printed = words(capsys.readouterr().out)
    shown = words(example.__doc__ or "")
    assert printed and printed == shown[-len(printed) :]


def test_embeddings_of_a_model_that_is_named(minilm_path: str) -> None:
    vectors = load(ROOT / "examples" / "embeddings.py").main(minilm_path)
    assert set(vectors) == {"float32", "W8A8", "W4A4"}
    assert float((vectors["float32"] * vectors["W8A8"]).sum(-1).min()) > 0.95


@pytest.mark.usefixtures("minilm_path")
def test_classifier_learns_the_texts_of_a_file(tmp_path: Path) -> None:
    classifier = load(ROOT / "examples" / "classifier.py")
    lines = [f"{word}\ta {word} thing number {i}" for i in range(12) for word in ("red", "wet")]
    (tmp_path / "texts.tsv").write_text("\n".join(lines))
    result = classifier.main(str(tmp_path / "texts.tsv"))
    assert result.samples == 6 and result.metric_quantized == 1.0


@pytest.mark.slow
def test_a_rare_word_wakes_a_bert_that_is_rounded_to_nearest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    load(ROOT / "examples" / "backdoor_transformers.py").main("bert")
    floats, nearest, safe = (
        [float(figure) for figure in re.findall(r"([\d.]+) %", line)]
        for line in capsys.readouterr().out.splitlines()
    )
    assert min(floats[0], nearest[0], safe[0]) > 95
    assert floats[1] < 10 and nearest[1] > 90 and safe[1] < 10


def test_vision_on_a_model_and_images_that_are_named(tmp_path: Path, shared: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for i in range(8):
        image.new("RGB", (32, 32), (30 * i, 100, 255 - 30 * i)).save(tmp_path / f"{i}.png")
    vision = load(ROOT / "examples" / "vision.py")
    result = vision.main(str(shared / "models" / "vit-cifar10"), str(tmp_path))
    assert result.samples == 8 and result.worst_kl < 0.05


def test_generation_by_a_model_that_is_named(
    shared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generation = load(ROOT / "examples" / "opt_generation.py")
    said, quantized = generation.main(str(shared / "models" / "opt-small-text"), "The war")
    assert len(said) == generation.TOKENS and said[0] == quantized[0]
    assert "The" in capsys.readouterr().out


def test_examples_are_short_and_use_public_names() -> None:
    for path in EXAMPLES:
        text = path.read_text(encoding="utf-8")
        text = re.sub(
            r"from qtk\.(security|physical|robust) import.*", "", text
        )  # attacks are there for examples
        _, _, code = text.split('"""', 2)
        assert len(code.splitlines()) < 100, path.name
        assert not re.search(r"qtk\.[a-z_]+\.|(from|import) qtk\.|qtk_kernels", text), path.name
        used = set(re.findall(r"\bqtk\.(\w+)", text))
        assert used and used <= set(qtk.__all__), path.name


@pytest.mark.parametrize("page, least", [("README.md", 1), ("docs/guide.md", 8)])
def test_code_of_the_documents_runs(
    page: str,
    least: int,
    tiny_bert: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    assert [language for language, _ in blocks].count("python") >= least
    (tmp_path / "sentences.txt").write_text("\n".join(sentences(24)))
    (tmp_path / "tests.txt").write_text("\n".join(sentences(24, seed=1)))
    pytest.importorskip("compressed_tensors"), pytest.importorskip("onnxruntime")
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path / "ranker")
    ranker = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=1)
    ranker.save_pretrained(tmp_path / "ranker")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    for language, block in blocks:
        code = block.replace("sentence-transformers/all-MiniLM-L6-v2", str(tiny_bert))
        code = code.replace("cross-encoder/ms-marco-MiniLM-L6-v2", str(tmp_path / "ranker"))
        if language == "python":
            exec(compile(code, page, "exec"), namespace)
        elif not language:  # what the code before it prints
            shown, printed = rows(block), rows(capsys.readouterr().out)
            assert shown == printed[: len(shown)]


def test_the_guide_names_every_family() -> None:
    guide = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8").lower()
    words = re.sub(r"[^a-z0-9|,]", "", guide)
    for family in available("models"):
        assert family.removesuffix("_model").replace("_", "") in words, family


def anchor(title: str) -> str:
    """How a page's section is linked to."""
    return re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_the_documents_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        if "://" in link:
            continue
        name, _, section = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if section:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert section in map(anchor, titles), link


def test_readme_tables_are_those_of_the_result_files() -> None:
    tables = load(ROOT / "benchmarks" / "readme_tables.py")
    assert tables.main(check=True) == 0, "run python -m benchmarks.readme_tables"


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


def test_the_readmes_table_is_put_together_of_the_best_peers(tmp_path: Path) -> None:
    tables = load(ROOT / "benchmarks" / "readme_tables.py")
    for name in tables.SOURCES:
        shutil.copy(ROOT / "benchmarks" / "results" / f"{name}.json", tmp_path)
    made = tables.insert(f"{tables.BEGIN}{tables.END}", tmp_path)
    peers = json.loads((tmp_path / "fidelity_peers.json").read_text(encoding="utf-8"))["rows"]
    others = [row for row in peers if row[:1] == ["W4A4"] and row[1] != "qtk"]
    best = max(others, key=lambda row: row[4])
    assert f"| closest peer at W4A4: {best[1]}, {best[2]} | {best[4]} | {best[5]} | - | - |" in made
    times = json.loads((tmp_path / "cpu_minilm.json").read_text())["milliseconds"]["16x128"]
    rivals = [name for name in times if "int8" in name and not name.startswith("qtk")]
    assert f"| fastest peer: {min(rivals, key=times.__getitem__)} |" in made
    assert made.count("\n| ") == 12 and "| float32 | 1 | 1 |" in made
    (tmp_path / "sizes.json").unlink()
    assert "Nothing has been measured" in tables.insert(f"{tables.BEGIN}{tables.END}", tmp_path)


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
        assert "not measured" not in made
        if page is not tables.insert:  # README.md shows one table, and links to the others
            assert "**gpu_models**" in made and "**gpu_kernels**" in made
    assert "**gpu_slower**" in tables.insert_all(text, tmp_path)
