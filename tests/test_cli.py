"""The command line, in this process, on a small BERT."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModel
from typer.testing import CliRunner, Result

import qtk
from qtk.cli import app
from qtk.demo.sentences import sentences
from qtk.errors import SchemeError


def call(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n".join(sentences(40)))
    return file


@pytest.fixture(scope="module")
def quantized(tiny_bert: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "out"
    result = call(
        "quantize", tiny_bert, out, "--calib", text, "--bits", "*.0.*=4,8", "--preset", "fast",
        "--skip", "*.1.output.dense",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "saved in" in result.stdout and "W4A8" in result.stdout and "W8A8" in result.stdout
    return out


def test_quantize_leaves_a_complete_folder(quantized: Path) -> None:
    from transformers import AutoTokenizer

    model = AutoModel.from_pretrained(quantized)
    tokenizer = AutoTokenizer.from_pretrained(quantized)
    assert model(**tokenizer("How does poetry work?", return_tensors="pt"))[0].isfinite().all()
    schemes = {layer.name: layer.scheme for layer in qtk.summary(model).layers}
    assert schemes["encoder.layer.0.output.dense"] == "W4A8"
    assert schemes["encoder.layer.1.intermediate.dense"] == "W8A8"
    assert schemes["encoder.layer.1.output.dense"] == "float"


def test_quantize_prints_pure_json(tiny_bert: Path, text: Path, tmp_path: Path) -> None:
    result = call("quantize", tiny_bert, tmp_path / "out", "--calib", text, "--json")
    assert result.exit_code == 0
    data = json.loads(result.stdout)
    assert len(data["layers"]) == 12 and "tokenizer.json" in data["files"]


def test_quantize_without_data_warns_on_stderr_only(tiny_bert: Path, tmp_path: Path) -> None:
    result = call("quantize", tiny_bert, tmp_path / "out", "--w", 4, "--json")
    assert result.exit_code == 0
    assert "token" in json.loads(result.stdout)["layers"][0]["scheme"]


def test_eval_compares(tiny_bert: Path, quantized: Path, text: Path) -> None:
    shown = call("eval", tiny_bert, quantized, "--data", text)
    assert shown.exit_code == 0 and "cosine, mean" in shown.stdout
    data = json.loads(call("eval", tiny_bert, quantized, "--data", text, "--json").stdout)
    assert data["samples"] == 40 and data["cosine"] > 0.9


def test_info_lists_the_layers(quantized: Path) -> None:
    shown = call("info", quantized)
    assert shown.exit_code == 0 and "attention.self.query" in shown.stdout
    assert len(json.loads(call("info", quantized, "--json").stdout)["layers"]) == 12


def test_an_out_that_holds_another_model_is_kept(
    tiny_bert: Path, quantized: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(quantized, out)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    refused = call("quantize", tiny_bert, out)
    assert refused.exit_code == 1 and "holds a model already" in refused.stderr
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert call("quantize", tiny_bert, out, "--w", 4, "--overwrite").exit_code == 0
    assert qtk.summary(out).layers[0].scheme.startswith("W4")


def test_a_tokenizer_from_elsewhere_is_used_and_saved(
    tiny_bert: Path, text: Path, tmp_path: Path
) -> None:
    bare, words, out = tmp_path / "bare", tmp_path / "words", tmp_path / "out"
    shutil.copytree(tiny_bert, words)
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.move(words / name, bare / name)
    args = ("quantize", bare, out, "--calib", text, "--preset", "fast", "--dtype", "bfloat16")
    assert "tokenizer" in call(*args).stderr
    result = call(*args, "--tokenizer", words, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert (out / "tokenizer.json").is_file()
    assert qtk.load(out).embeddings.word_embeddings.weight.dtype == torch.bfloat16
    compared = call(
        "eval", bare, out, "--data", text, "--tokenizer", words, "--samples", 7, "--json"
    )
    assert json.loads(compared.stdout)["samples"] == 7


def test_every_choice_is_in_the_help() -> None:
    shown = " ".join(call("quantize", "--help").stdout.replace("│", " ").split())
    named = ("os+", "equalize+rotate", "rotate", "smoothquant", "gptq", "tuned", "hessian", "auto",
             "int4", "log-sqrt2", "fp8", "16", "model", "MODEL", "OUT", "--overwrite")  # fmt: skip
    assert not [name for name in named if name not in shown]
    assert "{model}" not in shown


def test_a_full_disk_is_one_line(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(type(AutoModel.from_pretrained(tiny_bert)), "save_pretrained", full)
    result = call("quantize", tiny_bert, tmp_path / "out")
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert result.exit_code == 1 and "cannot be written" in line and "No space left" in line
    assert not (tmp_path / "out").exists()


def test_version_and_help() -> None:
    assert call("--version").stdout.strip() == qtk.__version__
    for args in (["--help"], ["quantize", "--help"], ["eval", "--help"], ["demo", "--help"]):
        assert call(*args).exit_code == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["info", "{model}"], "was not saved by qtk"),
        (["info", "/nowhere"], "no such folder"),
        (["quantize", "/nowhere", "{out}"], "no such folder"),
        (["quantize", "{model}", "{out}", "--device", "cuda:99"], "--device cuda:99"),
        (["quantize", "{model}", "{out}", "--learn", "much"], "learn='much'"),
        (["quantize", "{model}", "{model}"], "is the model itself"),
        (["quantize", "{model}", "{out}", "--w", "9"], "w=9"),
        (["quantize", "{model}", "{out}", "--method", "magic"], "choose"),
        (["quantize", "{model}", "{out}", "--calib", "/nowhere.txt"], "does not exist"),
        (["quantize", "{model}", "{out}", "--bits", "*.0.*"], "write PATTERN=W,A"),
        (["eval", "{model}", "{model}", "--data", "x.txt"], "was not saved by qtk"),
    ],
)
def test_errors_are_one_line(
    args: list[str], message: str, tiny_bert: Path, tmp_path: Path
) -> None:
    filled = [a.format(model=tiny_bert, out=tmp_path / "out") for a in args]
    result = call(*filled)
    assert result.exit_code == 1
    assert result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if line.strip()]
    assert line.startswith("error: ") and message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", [0, -1])
def test_debug_anywhere_shows_the_traceback(place: int, tiny_bert: Path, tmp_path: Path) -> None:
    args = ["quantize", tiny_bert, tmp_path / "out", "--w", "9"]
    args.insert(len(args) if place else 0, "--debug")
    assert isinstance(call(*args).exception, SchemeError)


def test_demo_prints_table_or_json(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import qtk.demo

    sizes = qtk.demo.Sizes(calibration=8, evaluation=4, shapes=((1, 4),), rounds=1)
    monkeypatch.setattr(qtk.demo.measure, "minilm", lambda: tiny_bert)
    monkeypatch.setattr(qtk.demo, "Sizes", lambda: sizes)
    monkeypatch.setattr(qtk.demo.measure, "reloads_exactly", lambda model, folder: True)
    result = call("demo", "--out", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    schemes = set(data["variants"]) - {"W7A8"}  # where eight bits run as floats
    assert Path(data["report"]).is_file() and schemes == {"W8A8", "W4A4"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures for minutes where there is a GPU")
def test_tune_says_that_it_needs_a_gpu() -> None:
    result = call("tune")
    assert result.exit_code == 1 and "there is none on this machine" in result.output


def test_export_writes_files_and_says_what_they_are(quantized: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    refused = call("export", quantized, tmp_path / "out", "--format", "compressed-tensors")
    assert refused.exit_code == 1 and "method='none'" in refused.stderr
    unknown = call("export", quantized, tmp_path / "out", "--format", "tflite")
    assert unknown.exit_code == 1 and "'onnx'" in unknown.stderr
    assert not (tmp_path / "out").exists()
    qmodel = qtk.quantize(qtk.load(quantized).dequantize(), 4, 16, progress=False)
    qmodel.save_pretrained(tmp_path / "packed")  # type: ignore[operator]
    done = call(
        "export", tmp_path / "packed", tmp_path / "out", "--format", "compressed-tensors",
        "--tokenizer", quantized, "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert data["files"] == ["config.json", "model.safetensors"] and data["cosine"] > 0.9999
    assert "tokenizer.json" in data["companions"]
