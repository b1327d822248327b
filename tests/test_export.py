"""Files for other runtimes: the same numbers, and a refusal by name where there is no form."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qtk
from qtk.discover import available, load
from qtk.formats import _layers, formats
from qtk.grids import InputGrid, LinearSpec, Steps
from qtk.scheme import Format
from tests.zoo import build

SMALL = {"num_hidden_layers": 1}
W4 = {"w": 4, "a": 16, "group_size": 16}
# Codes that stood between two values may fall to the other: one in some ten thousand tokens of
# these, and a step is a hundredth of what a linear reads.
CLOSE = 0.9999


def quantized(name: str, changes: dict[str, Any] = SMALL, **options: Any) -> tuple[Any, Any]:
    model, batch = build(name, **changes)
    return qtk.quantize(model, **{"calib": [batch], "progress": False, **options}), batch


def operators(folder: Path) -> dict[str, int]:
    onnx = pytest.importorskip("onnx")
    nodes = onnx.load(folder / "onnx" / "model.onnx").graph.node
    kinds = [node.op_type for node in nodes]
    return {kind: kinds.count(kind) for kind in kinds}


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "OPTForCausalLM", "ViTModel"])
def test_static_w8a8_is_plain_onnx(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    qmodel, _ = quantized(name)
    found = qtk.export(qmodel, tmp_path / "out")
    assert found.cosine > CLOSE and found.format == "onnx"
    kinds = operators(tmp_path / "out")
    assert kinds["QuantizeLinear"] == 4  # q, k and v are one product
    assert kinds["DequantizeLinear"] == 8
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config and config["architectures"] == [name]


def test_weights_alone_are_blocks_of_onnx_runtime_and_tables_are_codes(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    tables = {"embeddings.word_embeddings": (8, 16)}
    qmodel, _ = quantized("BertModel", **W4, weights="asymmetric", bits=tables)
    found = qtk.export(qmodel, tmp_path / "out")
    # sums of 64 float32 products, each to 2^-24 of values near 1
    assert found.largest_difference < 64 * 2**-24 * 8
    assert operators(tmp_path / "out")["MatMulNBits"] == 4
    assert any("MatMulNBits" in note for note in found.notes)


EMBED = """
import json, sys
import numpy, onnxruntime, tokenizers
folder, texts = sys.argv[1], json.load(open(sys.argv[2]))
options = onnxruntime.SessionOptions()
options.add_session_config_entry("session.x64quantprecision", "1")
session = onnxruntime.InferenceSession(f"{folder}/onnx/model.onnx", options)
tokenizer = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
tokenizer.enable_truncation(int(sys.argv[3])), tokenizer.enable_padding()
found = []
for start in range(0, len(texts), 32):
    encoded = tokenizer.encode_batch(texts[start : start + 32])
    ids = numpy.array([e.ids for e in encoded], numpy.int64)
    mask = numpy.array([e.attention_mask for e in encoded], numpy.int64)
    feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": ids * 0}
    hidden = session.run(None, feed)[0] * mask[..., None]
    pooled = hidden.sum(1) / mask.sum(1, keepdims=True)
    found.append(pooled / numpy.linalg.norm(pooled, axis=1, keepdims=True))
numpy.save(sys.argv[4], numpy.concatenate(found))
assert not {"torch", "qtk", "transformers"} & set(sys.modules)
"""


def embedded_elsewhere(folder: Path, texts: list[str], length: int, file: Path) -> np.ndarray:
    """Embeddings by a process that has neither torch nor qtk."""
    given = file.with_suffix(".json")
    given.write_text(json.dumps(texts))
    command = [sys.executable, "-c", EMBED, str(folder), str(given), str(length), str(file)]
    subprocess.run(command, check=True, cwd=folder)
    found: np.ndarray = np.load(file)
    return found


def test_a_process_without_torch_embeds_from_the_folder(tiny_bert: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from transformers import AutoModel, AutoTokenizer

    from qtk.demo.sentences import sentences
    from qtk.fidelity.compare import embed

    texts = sentences(40)
    model = AutoModel.from_pretrained(tiny_bert)
    qmodel = qtk.quantize(model, calib=texts[:20], progress=False)
    found = qtk.export(qmodel, tmp_path / "out", data=texts[20:])
    assert "tokenizer.json" in found.companions
    tokens = AutoTokenizer.from_pretrained(tiny_bert)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        wanted = embed(qmodel, dict(tokens)).numpy()
    y = embedded_elsewhere(tmp_path / "out", texts, 64, tmp_path / "y.npy")
    assert (y * wanted).sum(1).mean() > CLOSE


@pytest.mark.parametrize("bits, group, K, symmetric", [
    (4, 16, 64, True), (4, 32, 80, False), (8, 48, 96, True), (8, 16, 24, False),
    (3, None, 100, True),
])  # fmt: skip
def test_blocks_hold_the_weight(bits: int, group: int | None, K: int, symmetric: bool) -> None:
    fmt = Format(bits, symmetric, "channel" if group is None else "group", group)
    G = 1 if group is None else -(-K // group)
    codes = torch.randint(fmt.qmin, fmt.qmax + 1, (6, K)).to(torch.int8)
    zeros = None if symmetric else torch.randint(fmt.qmin, fmt.qmax + 1, (6, G)).float()
    steps = Steps(fmt, torch.randn(6, G), zeros)
    found = _layers.Blocks.of(LinearSpec(codes, steps, InputGrid(None), None))
    unsigned = unpacked(found.codes.reshape(6, -1), found.bits)
    middle = 2 ** (found.bits - 1)
    offset = middle if found.zeros is None else unpacked(found.zeros, found.bits)
    blocks = found.scale.shape[1]
    levels = unsigned.reshape(6, blocks, found.size) - np.broadcast_to(
        offset if found.zeros is None else offset[:, :blocks, None], (6, blocks, 1)
    )
    weight = (levels.astype(np.float32) * found.scale[..., None]).reshape(6, -1)
    assert not weight[:, K:].any()
    np.testing.assert_array_equal(weight[:, :K], steps.dequantize(codes).numpy())


def unpacked(data: np.ndarray, bits: int) -> np.ndarray:
    if bits == 8:
        return data.astype(np.int64)
    return np.stack([data & 15, data >> 4], -1).reshape(len(data), -1).astype(np.int64)


@pytest.mark.parametrize("options, told", [
    ({"activations": "token"}, "activations='static'"),
    ({"method": "rotate"}, "without rotation"),
    ({"w": 4}, "w=8, a=8"),
    ({"w": 4, "a": 4}, "w=8, a=8|without rotation"),
    ({"softmax": "code"}, "softmax='float'"),
    ({"group_size": 16}, "without group_size"),
    ({"w": 4, "a": 16, "group_size": 24}, "multiples of 16"),
    ({"w": "fp8", "a": "fp8", "calib": None}, "w=8, a=8"),
])  # fmt: skip
def test_what_onnx_has_no_form_for_is_refused_by_name(
    options: dict[str, Any], told: str, tmp_path: Path
) -> None:
    pytest.importorskip("onnxscript")
    qmodel, _ = quantized("BertModel", **options)
    with pytest.raises(qtk.SchemeError, match=rf"encoder\.layer\.0\..*({told})"):
        qtk.export(qmodel, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_only_a_quantized_model_a_known_format_and_an_empty_folder(tmp_path: Path) -> None:
    qmodel, _ = quantized("BertModel")
    with pytest.raises(qtk.SchemeError, match="'compressed-tensors', 'gguf', 'onnx', 'openvino'"):
        qtk.export(qmodel, tmp_path / "out", format="tflite")
    (tmp_path / "file").write_text("")
    for out in (tmp_path, tmp_path / "file", ""):
        with pytest.raises(qtk.CheckpointError, match="folder"):
            qtk.export(qmodel, out)
    with pytest.raises(qtk.ModelError, match=r"qtk\.quantize first"):
        qtk.export(build("BertModel")[0], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name, options", [
    ("BertForSequenceClassification", {"method": "none"}),
    ("OPTForCausalLM", {"w": 4, "a": 8, "method": "none", "bits": {"*.fc1": (8, 8)}}),
    ("OPTForCausalLM", W4),
    ("BertModel", {"method": "none", "activations": "token"}),
    ("BertForMaskedLM", {"w": 4, "a": 16}),
    ("ViTForImageClassification", {"method": "none"}),
])  # fmt: skip
def test_compressed_tensors_go_out_and_come_back(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    qmodel, batch = quantized(name, {}, **options)
    found = qtk.export(qmodel, tmp_path / "out", "compressed-tensors")
    dynamic = options.get("activations") == "token"  # whose scales the package finds by its rule
    # a float32 sum of 64 products in another order, of logits below 8
    assert found.largest_difference < (0.01 if dynamic else 64 * 2**-24 * 8)
    again = qtk.load(tmp_path / "out")
    with torch.no_grad():
        y, wanted = again(**batch)[0], qmodel(**batch)[0]
    assert torch.cosine_similarity(y, wanted, dim=-1).min() > CLOSE if dynamic else y.equal(wanted)
    kept = qtk.summary(again).layers
    assert [layer.scheme for layer in kept] == [
        layer.scheme for layer in qtk.summary(qmodel).layers
    ]
    again.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert qtk.load(tmp_path / "again")(**batch)[0].equal(y)


@pytest.mark.parametrize("change, told", [
    (lambda c: c["config_groups"]["group_0"]["weights"].update(type="float"), "float"),
    (lambda c: c["config_groups"]["group_0"]["weights"].update(strategy="block"), "block"),
    (lambda c: c.pop("config_groups"), "config_groups"),
    (lambda c: c.update(ignore=[]), r"no .*pooler\.dense\.weight_scale"),
    (lambda c: c.update(ignore=["Linear"]), "targets"),
])  # fmt: skip
def test_a_foreign_checkpoint_that_does_not_fit_is_refused(
    change: Any, told: str, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    qmodel, _ = quantized("BertModel", **W4)
    qtk.export(qmodel, tmp_path / "out", "compressed-tensors")
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    change(config["quantization_config"])
    file.write_text(json.dumps(config))
    with pytest.raises(qtk.CheckpointError, match=told):
        qtk.load(tmp_path / "out")


def test_compressed_tensors_refuse_a_changed_input(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    qmodel, _ = quantized("BertModel", method="smoothquant")
    with pytest.raises(qtk.SchemeError, match="method='none'"):
        qtk.export(qmodel, tmp_path / "out", "compressed-tensors")


@pytest.mark.parametrize("bits", [4, 8])
def test_gguf_holds_the_codes(bits: int, tiny_bert: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from transformers import AutoModel

    qmodel = qtk.quantize(
        AutoModel.from_pretrained(tiny_bert), bits, 16, group_size=32, progress=False
    )
    found = qtk.export(qmodel, tmp_path / "out", "gguf")
    assert found.files == ("model.gguf",) and found.worst > CLOSE
    other = qtk.quantize(AutoModel.from_pretrained(tiny_bert), bits, 16, progress=False)
    with pytest.raises(qtk.SchemeError, match="group_size=32"):
        qtk.export(other, tmp_path / "other", "gguf")


@pytest.mark.slow
@pytest.mark.parametrize("family", available("models"))
def test_every_family_is_onnx(family: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model, batch = load("models", family).tiny()
    qmodel = qtk.quantize(model, calib=[batch], progress=False)
    assert qtk.export(qmodel, tmp_path / "out").cosine > CLOSE


@pytest.mark.slow
@pytest.mark.parametrize("name", [
    "BertForMaskedLM", "BertForTokenClassification", "BertForQuestionAnswering",
    "RobertaForSequenceClassification", "DistilBertModel", "OPTModel", "OPT350m",
    "ViTForImageClassification", "DistilledDeiT",
])  # fmt: skip
def test_every_head_is_onnx_and_openvino(name: str, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    qmodel, _ = quantized(name)
    for format in ("onnx", "openvino"):
        assert qtk.export(qmodel, tmp_path / format, format).cosine > CLOSE


@pytest.mark.slow
def test_sts_b_by_a_process_without_torch(minilm_path: str, shared: Path, tmp_path: Path) -> None:
    """Spearman from the exported folder within .1 of a point of qtk's own."""
    pytest.importorskip("onnxruntime")
    from scipy.stats import spearmanr
    from transformers import AutoModel, AutoTokenizer

    from benchmarks import data
    from qtk.fidelity.compare import embed

    rows = data._stsb("test")
    texts = [text for row in rows for text in row[5:7]]
    scores = [float(row[4]) for row in rows]
    calib = data.stsb_calibration(0)
    qmodel = qtk.quantize(
        AutoModel.from_pretrained(minilm_path), calib=calib, preset="fast", progress=False
    )
    qtk.export(qmodel, tmp_path / "out", data=calib[:32])
    y = embedded_elsewhere(tmp_path / "out", texts, 128, tmp_path / "y.npy")
    tokenizer, found = AutoTokenizer.from_pretrained(minilm_path), []
    for start in range(0, len(texts), 32):
        batch = tokenizer(
            texts[start : start + 32], padding=True, truncation=True, max_length=128,
            return_tensors="pt",
        )  # fmt: skip
        with torch.no_grad():
            found.append(embed(qmodel, dict(batch)).numpy())
    own = np.concatenate(found)
    there, here = (spearmanr((e[::2] * e[1::2]).sum(1), scores).statistic for e in (y, own))
    print(
        f"Spearman {100 * there:.2f} there, {100 * here:.2f} here, cosine {(y * own).sum(1).mean()}"
    )
    assert abs(there - here) < 0.001
    # float sums of two programs differ in their last bits, codes that stood between two values fall
    # to the other, and what follows moves: as it does for a sentence alone and in a batch
    assert (y * own).sum(1).mean() > 0.999


def test_the_formats_are_the_files() -> None:
    assert set(formats()) >= {"compressed-tensors", "gguf", "onnx", "openvino"}
