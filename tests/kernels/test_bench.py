"""The benches of the GPU, run to their end without one: only the clock is made up."""

import csv
import json
from importlib.util import find_spec

import pytest
import torch
from transformers import BertConfig, BertModel

from benchmarks import readme_tables
from benchmarks.speed import gpu_attention, gpu_device, gpu_models, gpu_peers, gpu_tables
from benchmarks.speed import gpu_kernels as bench
from qtk_kernels import tune
from qtk_kernels.dispatch import use_backend

RUN = {"device": "imagined GPU", "driver": "1", "torch": "2", "triton": "3"}
LIMITS = {"bytes": 4e6, "bf16": 8e8, "int8": 1.6e9}
HEAD = {"hardware": "imagined GPU", "versions": {"torch": "2"}}
SHAPES = [(kernel, (17, 32, 160)) for kernel in (*tune.KERNELS, bench.FROM_FLOAT)]
SHAPES += [(kernel, (3, 64)) for kernel in bench.QUANTIZERS]


def clock(calls):
    """Runs one call, for its errors, and says five microseconds."""
    calls[-1]()
    return 5.0


@pytest.fixture
def imagined(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "DEVICE", "cpu")
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    monkeypatch.setattr(bench, "microseconds", clock)
    monkeypatch.setattr(bench, "compiled", lambda name: bench.quantizer)
    for module in (bench, tune, gpu_peers):
        monkeypatch.setattr(module, "rounds_of", lambda bytes_: 2)
    monkeypatch.setattr(bench, "cases", lambda: SHAPES)
    monkeypatch.setattr(bench, "this_run", lambda: RUN)
    monkeypatch.setattr(bench, "ceilings", lambda: LIMITS)
    monkeypatch.setattr(
        bench, "write_tables", lambda rows, head: gpu_tables.write_tables(rows, head, tmp_path)
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return tmp_path


def test_a_run_writes_tables_and_the_next_one_goes_on(imagined, capsys):
    assert bench.main(["--minutes", "0"]) == 0
    assert "out of time" in capsys.readouterr().out
    assert bench.main([]) == 0
    printed = capsys.readouterr().out
    rows = gpu_tables.read_csv(imagined / "gpu_kernels.csv", RUN)
    assert [(row["kernel"], row["shape"]) for row in rows] == [
        (kernel, "x".join(map(str, shape))) for kernel, shape in SHAPES
    ]
    peers = {row["kernel"]: set(gpu_tables.peers_of(row)) for row in rows}
    assert peers["int8_linear"] == {"bf16", "int_mm"} and "Error" not in printed
    assert peers["layer_norm_quantize"] == {"eager", "compile"}
    assert all("bf16" in found for name, found in peers.items() if name not in bench.QUANTIZERS)
    for name in ("gpu_kernels", "gpu_slower"):
        assert json.loads((imagined / f"{name}.json").read_text()).keys() >= readme_tables.KEYS
    assert (imagined / "gpu_kernels.png").exists() == (find_spec("matplotlib") is not None)
    before = (imagined / "gpu_kernels.csv").read_text()
    assert bench.main([]) == 0  # nothing is left to measure
    assert (imagined / "gpu_kernels.csv").read_text() == before
    assert gpu_tables.read_csv(imagined / "gpu_kernels.csv", {**RUN, "driver": "2"}) == []


def test_without_a_gpu_the_compilers_report_is_made(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bench, "ahead_of_time", lambda: 7)
    assert bench.main([]) == 7
    assert "No GPU: nothing is measured" in capsys.readouterr().out


def test_a_peer_that_fails_loses_only_its_own_time(imagined, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(bench, "library", fail)
    row = bench.measured("int8_linear", (17, 32, 160), LIMITS)
    assert row["us"] == 5.0 and gpu_tables.peers_of(row) == {}
    assert "no such kernel" in capsys.readouterr().out


def test_every_model_shape_is_measured_at_every_number_of_rows():
    cases = bench.cases()
    assert len(cases) == len(set(cases))
    for hidden, mlp in tune.MODELS.values():
        for M in (1, 16, 64, 512, 4096):
            for kernel in tune.KERNELS:
                for N, K in ((hidden, hidden), (mlp, hidden), (hidden, mlp)):
                    assert (kernel, (M, N, K)) in cases
            for kernel in bench.QUANTIZERS:
                assert (kernel, (M, hidden)) in cases and (kernel, (M, mlp)) in cases


def row(kernel="int8_linear", shape="16x64x128", us=2.0, **peers):
    M, N, K = map(int, shape.split("x"))
    work = {"bytes": float(N * K + M * K + 2 * M * N), "ops": 2.0 * M * N * K}
    roofs = {"roof_bytes": LIMITS["bytes"], "roof_ops": LIMITS["int8"], "first_call_s": 0.1}
    return {"kernel": kernel, "shape": shape, "us": us, **work, **roofs, **peers, **RUN}


def test_packages_stand_beside_at_shapes_of_their_own(imagined, monkeypatch):
    case = (bench.FROM_FLOAT + bench.BESIDE, (17, 32, 128))
    monkeypatch.setattr(bench, "package_cases", lambda: [case])
    assert bench.main(["--packages"]) == 0
    (row,) = gpu_tables.read_csv(imagined / "gpu_kernels.csv", RUN)
    installed = {name for name in gpu_device.PACKAGES if find_spec(name) is not None}
    assert set(gpu_tables.peers_of(row)) <= {"bf16"} | installed
    monkeypatch.undo()
    assert len(bench.package_cases()) == 16


def test_shares_are_of_the_nearer_roof():
    memory = gpu_tables.derived(row(shape="1x4096x4096", us=8.4))
    assert memory["bound"] == "memory"
    assert memory["of_ceiling"] == round((4096 * 4096 + 4096 + 8192) / 4e6 / 8.4, 3)
    compute = gpu_tables.derived(row(shape="8192x8192x8192", us=1000.0))
    assert compute["bound"] == "compute"
    assert compute["of_ceiling"] == round(2 * 8192**3 / 1.6e9 / 1000, 3)
    assert compute["TOPS"] == round(2 * 8192**3 / 1e9, 2)


def test_shapes_where_a_peer_is_faster_are_listed_worst_first():
    rows = [
        row(bf16_us=1.0, int_mm_us=3.0), row(shape="1x64x128", bf16_us=0.5),
        row("fp8_linear", bf16_us=4.0),
    ]  # fmt: skip
    table = gpu_tables.slower(rows, HEAD)
    assert table["rows"] == [
        ["int8_linear", "1x64x128", "2.00", "bf16", "0.50", "4.00x"],
        ["int8_linear", "16x64x128", "2.00", "bf16", "1.00", "2.00x"],
    ]
    assert table["notes"].startswith("2 of 3")


def test_the_summary_has_a_line_for_each_kernel_and_number_of_rows():
    rows = [row(bf16_us=4.0), row(shape="16x64x256", bf16_us=1.0), row("fp8_linear")]
    table = gpu_tables.summary(rows, HEAD)
    assert table["columns"] == ["kernel", "rows", "shapes", "first call, s", "of roof", "over bf16"]
    assert [line[:3] for line in table["rows"]] == [
        ["int8_linear", "16", "2"], ["fp8_linear", "16", "1"]
    ]  # fmt: skip
    assert [line[5] for line in table["rows"]] == ["0.50x / 1.25x / 2.00x", ""]


def test_rows_survive_the_file(tmp_path):
    rows = [row(bf16_us=4.0), row("fp8_linear", scaled_mm_us=1.5)]
    gpu_tables.write_csv(rows, tmp_path / "rows.csv")
    assert gpu_tables.read_csv(tmp_path / "rows.csv", RUN) == rows
    with (tmp_path / "rows.csv").open() as file:
        assert next(csv.DictReader(file))["of_ceiling"]


def test_libraries_products_are_what_they_are_called():
    M, N, K = 17, 32, 64
    for name in ("bf16", "int8"):
        calls = gpu_peers.library(name, M, N, K, "cpu")
        assert calls is not None and calls[0]().shape == (M, N)
    assert gpu_peers.library("int8", 16, N, K, "cpu") is None  # _int_mm wants more rows
    assert gpu_peers.library("fp8", M, 30, K, "cpu") is None  # _scaled_mm wants multiples of 16


@pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao")
def test_torchao_runs_its_w8a8(monkeypatch):
    monkeypatch.setattr(gpu_peers, "rounds_of", lambda bytes_: 2)
    calls = gpu_peers.package("torchao", "W8A8", 4, 64, 128, "cpu")
    assert calls is not None and calls[0]().shape == (4, 64)


def test_packages_that_are_missing_or_do_not_take_a_shape_are_no_peers(monkeypatch):
    assert gpu_peers.package("gemlite", "W4A16", 4, 64, 100, "cpu") is None
    monkeypatch.setattr(gpu_peers, "find_spec", lambda name: None)
    assert gpu_peers.package("gemlite", "W4A16", 4, 64, 128, "cpu") is None


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_measured_beside_the_library(imagined, monkeypatch, causal):
    monkeypatch.setattr(gpu_attention, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_attention, "RESULTS", imagined)
    monkeypatch.setattr(gpu_attention, "TOKENS", 40)
    monkeypatch.setattr(gpu_attention, "HEADS", 2)
    monkeypatch.setattr(gpu_attention, "LENGTHS", (20,))
    monkeypatch.setattr(gpu_attention, "BUFFERS", 1)
    monkeypatch.setattr(gpu_attention, "microseconds", clock)
    monkeypatch.setattr(gpu_attention, "this_run", lambda: RUN)
    with use_backend("triton"):
        rows = gpu_attention.measured(20, causal)
        gpu_attention.main([])
    found = {row[2]: float(row[5]) for row in rows}
    ours = [name for name in found if name.startswith("qtk")]
    assert len(ours) == 2 and "MATH" in found
    assert all(found[name] < 0.2 for name in found)
    table = json.loads((imagined / "gpu_attention.json").read_text())
    assert table.keys() >= readme_tables.KEYS and len(table["rows"]) == 2 * len(rows)


def test_whole_models_are_measured_in_bfloat16(imagined, monkeypatch):
    def tiny():
        config = BertConfig(num_hidden_layers=1, hidden_size=128, num_attention_heads=2,
                            intermediate_size=256, vocab_size=20001)  # fmt: skip
        return BertModel(config), gpu_models.ids

    outputs = []

    def keep(calls):
        outputs.append(calls[0]()[0])
        return 2000.0

    monkeypatch.setattr(gpu_models, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_models, "RESULTS", imagined)
    monkeypatch.setattr(gpu_models, "MODELS", {"tiny": tiny, "other": tiny})
    monkeypatch.setattr(gpu_models, "BATCHES", (1, 2))
    monkeypatch.setattr(gpu_models, "TOKENS", 5)
    monkeypatch.setattr(gpu_models, "this_run", lambda: RUN)
    monkeypatch.setattr(gpu_models, "microseconds", keep)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # for quantizing, there is none
    assert gpu_models.main([]) == 0 and not list(imagined.iterdir())
    rows = list(gpu_models.measured("tiny", float("inf")))
    assert [row[:3] for row in rows] == [
        ["tiny", batch, what] for what in ("bfloat16, compiled", *gpu_models.SCHEMES)
        for batch in ("1", "2")
    ]  # fmt: skip
    assert all(row[3:] == ["2.000", "1.00x"] for row in rows)
    want, *quantized = outputs[::2]
    assert all(y.dtype == torch.bfloat16 for y in outputs)
    assert all(((y - want).norm() / want.norm()).item() < 0.2 for y in quantized)
    monkeypatch.setattr(gpu_models, "measured", lambda name, end: [[name]])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for arguments in ([], ["--model", "other"]):  # another run replaces rows of its models only
        assert gpu_models.main(arguments) == 0
        table = json.loads((imagined / "gpu_models.json").read_text())
        assert table["rows"] == [["tiny"], ["other"]]
