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

RUN = {"device": "imagined GPU", "driver": "1", "torch": "2", "triton": "3"}
CSV = "gpu_kernels_imagined_gpu.csv"
LIMITS = {"bytes": 4e6, "bf16": 8e8, "int8": 1.6e9}
ROOFS = {"roof_bytes": 1.0, "roof_ops": 1.0, "first_call_s": 0.1}
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
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return tmp_path


def test_a_run_writes_tables_and_the_next_one_goes_on(imagined, capsys):
    assert bench.main(["--minutes", "0"]) == 0
    assert "out of time" in capsys.readouterr().out
    assert bench.main([]) == 0
    printed = capsys.readouterr().out
    rows = gpu_tables.read_csv(imagined / CSV, RUN)
    assert [(row["kernel"], row["shape"]) for row in rows] == [
        (kernel, "x".join(map(str, shape))) for kernel, shape in SHAPES
    ]
    peers = {row["kernel"]: set(gpu_tables.peers_of(row)) for row in rows}
    assert peers["int8_linear"] == {"bf16", "int_mm", "int_mm_scaled"}
    failed = [line for line in printed.splitlines() if "Error" in line]
    if torch.__version__ < "2.12":  # its CPUs scale a product of float8 by the tensor alone
        failed = [line for line in failed if "fp8_linear" not in line]
    assert not failed
    assert peers["layer_norm_quantize"] == {"eager", "compile"}
    assert all("bf16" in found for name, found in peers.items() if name not in bench.QUANTIZERS)
    for name in ("gpu_kernels", "gpu_slower"):
        assert (
            json.loads((imagined / f"{name}_imagined_gpu.json").read_text()).keys()
            >= readme_tables.KEYS
        )
    plot = imagined / "plot.png"
    assert gpu_tables.plot(rows, plot) == plot.exists() == (find_spec("matplotlib") is not None)
    before = (imagined / CSV).read_text()
    assert bench.main([]) == 0  # nothing is left to measure
    assert (imagined / CSV).read_text() == before
    assert gpu_tables.read_csv(imagined / CSV, {**RUN, "driver": "2"}) == []


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
    monkeypatch.setattr(bench, "find_spec", lambda name: True)
    monkeypatch.setattr(bench, "package_cases", lambda: [case])
    assert bench.main(["--packages"]) == 0
    (row,) = gpu_tables.read_csv(imagined / CSV, RUN)
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


def test_attention_is_measured_beside_the_library(imagined, monkeypatch):
    monkeypatch.setattr(gpu_attention, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_attention, "RESULTS", imagined)
    monkeypatch.setattr(gpu_attention, "TOKENS", 40)
    monkeypatch.setattr(gpu_attention, "HEADS", 2)
    monkeypatch.setattr(gpu_attention, "LENGTHS", (20,))
    monkeypatch.setattr(gpu_attention, "BUFFERS", 1)
    monkeypatch.setattr(gpu_attention, "microseconds", clock)
    monkeypatch.setattr(gpu_attention, "this_run", lambda: RUN)
    assert gpu_attention.main([]) == 0
    path = imagined / "gpu_attention_imagined_gpu.json"
    table = json.loads(path.read_text())
    assert table.keys() >= readme_tables.KEYS
    for causal in ("no", "yes"):
        rows = [row for row in table["rows"] if row[1] == causal]
        found = {row[2]: float(row[5]) for row in rows if row[4]}
        assert len([name for name in found if name.startswith("qtk")]) == 3 and "MATH" in found
        assert all(error < 0.2 for error in found.values())
        refused = [row for row in rows if not row[4]]
        assert all("Error" in row[5] and row[2] in gpu_attention.BACKENDS for row in refused)
    assert gpu_attention.main([]) == 0 and json.loads(path.read_text()) == table  # goes on behind


def test_whole_models_are_measured_in_bfloat16(imagined, monkeypatch):
    def tiny():
        config = BertConfig(num_hidden_layers=1, hidden_size=128, num_attention_heads=2,
                            intermediate_size=256, vocab_size=20001)  # fmt: skip
        return BertModel(config), gpu_models.ids

    outputs = []

    def keep(calls, graph):
        y = calls[0]()
        outputs.append(y if isinstance(y, torch.Tensor) else y[0])
        return 2000.0

    def attend(self, q, k, v):  # what PyTorch's FlashAttention computes, sentence by sentence
        parts = [x.split(self.starts.diff().tolist()) for x in (q, k, v)]
        done = [torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(0, 1) for x in sentence)).transpose(0, 1)
            for sentence in zip(*parts, strict=True)]  # fmt: skip
        return torch.cat(done)

    monkeypatch.setattr(gpu_models, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_models, "RESULTS", imagined)
    monkeypatch.setattr(gpu_models, "MODELS", {"tiny": tiny})
    monkeypatch.setattr(gpu_models, "BATCHES", (4,))
    monkeypatch.setattr(gpu_models, "TOKENS", 16)
    monkeypatch.setattr(gpu_models, "this_run", lambda: RUN)
    monkeypatch.setattr(gpu_models, "microseconds", keep)
    monkeypatch.setattr(gpu_models.Unpadded, "varlen", attend)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # for quantizing, there is none
    assert gpu_models.main(["--batch", "4"]) == 0 and not list(imagined.iterdir())
    monkeypatch.setattr(gpu_models, "has_gpu", lambda: True)
    assert gpu_models.main(["--model", "tiny"]) == 0
    path = imagined / "gpu_models_imagined_gpu.json"
    rows = json.loads(path.read_text())["rows"]
    contenders = [gpu_models.BFLOAT16, *gpu_models.SCHEMES]
    assert {(row[2], row[3]) for row in rows} == {
        *((lengths, what) for lengths in ("full", "mixed") for what in contenders),
        ("mixed", gpu_models.FLOAT16),
    }
    assert all(row[4:] == ["2.000", "1.00x"] for row in rows)
    given = {(row[2], row[3]): y for row, y in zip(rows, outputs, strict=True)}
    for (lengths, _), y in given.items():
        want = given[lengths, gpu_models.BFLOAT16].float()
        counts = torch.ones(4, 16, dtype=torch.bool)
        if lengths == "mixed":
            counts = gpu_models.mixed({"attention_mask": counts})["attention_mask"].bool()
        assert (y.float()[counts] - want[counts]).norm() / want[counts].norm() < 0.2
    assert gpu_models.main(["--model", "tiny", "--resume"]) == 0
    assert len(outputs) == len(rows)  # nothing is measured again


def test_a_kernel_that_fails_is_a_row_and_a_lost_device_ends_the_process(imagined, monkeypatch):
    def fail(name, shape, limits):
        if name == tune.KERNELS[1]:
            raise RuntimeError("out of resource")
        return {"us": 5.0, "bytes": 1.0, "ops": 1.0, **ROOFS}

    monkeypatch.setattr(bench, "measured", fail)
    assert bench.main([]) == 0
    rows = gpu_tables.read_csv(imagined / CSV, RUN)
    assert len(rows) == len(SHAPES)
    assert [row["error"] for row in rows if "us" not in row] == ["RuntimeError: out of resource"]
    (imagined / CSV).unlink()
    monkeypatch.setattr(bench, "answers", lambda device: False)
    assert bench.main([]) == gpu_device.RESTART
    monkeypatch.setattr(bench, "answers", lambda device: True)
    assert bench.main([]) == 0  # behind the case that lost it
    rows = gpu_tables.read_csv(imagined / CSV, RUN)
    assert rows[0]["fatal"] and len(rows) == len(SHAPES)
    assert not any("fatal" in row for row in rows[1:])
