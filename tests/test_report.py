"""summary(): what it says of a model, and how it looks."""

import json
import math
from pathlib import Path

import pytest
import torch

import qtk
from qtk.discover import load
from qtk.report.summary import LayerSummary, Summary, common_prefix


@pytest.fixture(scope="module")
def quantized() -> torch.nn.Module:
    model, batch = load("models", "bert").tiny()
    return qtk.quantize(
        model, 8, 8, calib=[batch], skip=["*.0.output.dense"], bits={"*.1.*": (4, 8)},
        progress=False,
    )  # fmt: skip


def test_summary_tells_every_linear(quantized: torch.nn.Module) -> None:
    result = qtk.summary(quantized)
    schemes = {layer.name: layer.scheme for layer in result.layers}
    assert len(schemes) == 12
    assert schemes["encoder.layer.0.intermediate.dense"] == "W8A8"
    assert schemes["encoder.layer.0.output.dense"] == "float"
    assert schemes["encoder.layer.1.intermediate.dense"] == "W4A8"
    by_name = {layer.name: layer for layer in result.layers}
    assert by_name["encoder.layer.0.output.dense"].kernel == "torch linear float32"
    assert by_name["encoder.layer.0.output.dense"].sqnr is None
    assert by_name["encoder.layer.0.intermediate.dense"].bytes == 64 * 32 + 4 * 64
    assert by_name["encoder.layer.0.intermediate.dense"].float_bytes == 4 * 64 * 32
    assert not by_name["encoder.layer.0.intermediate.dense"].fused  # one of its linears is float
    assert by_name["encoder.layer.1.intermediate.dense"].sqnr > 5


def test_bytes_add_up_to_the_checkpoint(quantized: torch.nn.Module) -> None:
    result = qtk.summary(quantized)
    state = quantized.state_dict().values()
    assert result.bytes + result.other_bytes == sum(t.numel() * t.element_size() for t in state)


def test_an_embedding_in_integers_is_listed() -> None:
    model, batch = load("models", "bert").tiny()
    name = "embeddings.word_embeddings"
    qmodel = qtk.quantize(model, 8, 8, calib=[batch], bits={name: (8, 16)}, progress=False)
    result = qtk.summary(qmodel)
    assert result.layers[-1].name == name and len(result.layers) == 13
    assert result.layers[-1].bytes == 99 * 32 + 4 * 99
    table = result.table()
    assert "kernel" in table.splitlines()[0] and name in table


def test_tied_weights_count_once() -> None:
    model, batch = load("models", "opt").tiny()
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    before = qtk.quantize(model, 8, 8, calib=[batch], progress=False)
    once = sum(p.numel() * p.element_size() for p in before.parameters())
    buffers = sum(
        b.numel() * b.element_size()
        for n, b in before.state_dict().items()
        if n not in dict(before.named_parameters(remove_duplicate=False))
    )
    result = qtk.summary(before)
    assert result.bytes + result.other_bytes == once + buffers


def test_summary_survives_json(quantized: torch.nn.Module) -> None:
    result = qtk.summary(quantized)
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert len(data["layers"]) == 12 and data["bytes"] == result.bytes
    assert data["recipe"]["w"] == 8 and data["recipe"]["method"]


def test_a_float_model_has_no_summary() -> None:
    model, _ = load("models", "bert").tiny()
    with pytest.raises(qtk.ModelError, match=r"run qtk\.quantize first"):
        qtk.summary(model)


def test_moving_a_model_does_not_unfuse_its_summary() -> None:
    model, batch = load("models", "bert").tiny()
    qmodel = qtk.quantize(model, 8, 8, calib=[batch], progress=False)
    fused = [layer.fused for layer in qtk.summary(qmodel).layers]
    assert [layer.fused for layer in qtk.summary(qmodel.to("cpu")).layers] == fused


def layer(name: str, kernel: str = "k8", fused: bool = True, sqnr: float | None = 30.0):
    return LayerSummary(name, "W8A8", kernel, fused, 1500, 4000, sqnr)


def test_table_where_all_layers_run_alike() -> None:
    result = Summary((layer("enc.0.q"), layer("enc.0.fc1", sqnr=None)), {}, 2_000_000)
    assert result.table() == (
        "layer  scheme   kB  of fp32  SQNR\n"
        "-----  ------  ---  -------  ----\n"
        "q      W8A8    1.5    0.375  30.0\n"
        "fc1    W8A8    1.5    0.375     -\n"
        "\n"
        "layers 0.00 MB of 0.01 MB in float32, everything else 2.00 MB\n"
        "all run by k8, in fused blocks\n"
        "names start with 'enc.0.'\n"
        "SQNR in dB, on calibration data"
    )


def test_table_where_layers_run_differently() -> None:
    layers = (layer("a.0.q", sqnr=math.inf), layer("a.1.q", "torch linear float32", False))
    table = Summary(layers, {}, 0).table()
    assert table.splitlines()[0] == (
        "layer  scheme  kernel                fused   kB  of fp32  SQNR"
    )
    assert "all run by" not in table and "names start with 'a.'" in table


def test_what_is_in_brackets_behind_a_kernel_stands_once() -> None:
    kernels = ("chunks (no int8 here)", "chunks (no int8 here), unpacked")
    layers = tuple(layer(f"a.{i}.q", kernel) for i, kernel in enumerate(kernels))
    lines = Summary(layers, {}, 0).table().splitlines()
    assert "chunks            yes" in lines[2] and "chunks, unpacked  yes" in lines[3]
    assert [line for line in lines if "int8" in line] == ["chunks: no int8 here"]


def test_table_fits_a_terminal(quantized: torch.nn.Module) -> None:
    assert max(map(len, qtk.summary(quantized).table().splitlines())) <= 100


def test_common_prefix_ends_at_a_dot() -> None:
    assert common_prefix(["enc.layer.0.q", "enc.layer.1.q"]) == "enc.layer."
    assert common_prefix(["enc.layer.10.q", "enc.layer.1.q"]) == "enc.layer."
    assert common_prefix(["enc.q", "dec.q"]) == ""
    assert common_prefix(["q", "a.k"]) == ""
    assert common_prefix([]) == ""


def test_a_folder_has_a_summary(quantized: torch.nn.Module, tmp_path: Path) -> None:
    quantized.save_pretrained(tmp_path / "saved")
    for folder in (tmp_path / "saved", str(tmp_path / "saved")):
        assert qtk.summary(folder).to_dict() == qtk.summary(quantized).to_dict()
    with pytest.raises(qtk.CheckpointError, match="no config"):
        qtk.summary(tmp_path)
