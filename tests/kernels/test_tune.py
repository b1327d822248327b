"""`qtk tune`, with a clock of its own in the place of a GPU's."""

import json

import pytest
import torch
from typer.testing import CliRunner

from qtk_kernels import _launch, _plan, tune

NAME = "imagined GPU"
CARD = _launch.Card(NAME, (9, 0), 132)


def clock(calls, rounds=1, graph=True):
    """Kernels are the faster, the more stages; a tile that asks for five does not fit."""
    stages = (_launch._forced or {"num_stages": 0})["num_stages"]
    if stages == 5:
        raise tune.triton.OutOfResources(300000, 232448, "shared memory")
    return 10.0 - stages


@pytest.fixture
def imagined(tmp_path, monkeypatch):
    """Two small shapes on the CPU, as if it were a GPU of capability 9.0."""
    monkeypatch.setattr(tune, "_this_gpu", lambda: (torch.device("cpu"), CARD))
    monkeypatch.setattr(tune, "microseconds", clock)
    monkeypatch.setattr(tune, "linear_calls", lambda *_: [lambda: torch.ones(1)])
    monkeypatch.setattr(tune, "widths", lambda: [(32, 160)])
    monkeypatch.setattr(tune, "ROWS", (1, 17))
    return tmp_path


def test_the_fastest_tile_that_fits_is_written(imagined):
    lines = []
    path = tune.tune(imagined, log=lines.append)
    table = _launch.read_table(path)
    assert path.name == "sm_90_132_imagined_gpu.json" and [p.name for p in imagined.iterdir()] == [
        path.name
    ]
    assert table["device"] == NAME and table["versions"]["torch"] == torch.__version__
    assert {(e["kernel"], e["M"]) for e in table["entries"]} == {
        (kernel, M) for kernel in tune.KERNELS for M in (1, 17)
    }
    for entry in table["entries"]:
        most = 3 if entry["M"] == 1 else 4  # what `candidates` offers beside five
        assert entry["tile"]["num_stages"] == most and entry["us"] == 10.0 - most
        assert entry["before_us"] == 10.0 and entry["first_call_s"] >= 0
    assert len(lines) == len(table["entries"]) and "first call" in lines[0]


def test_kernels_follow_what_was_measured(imagined, monkeypatch):
    path = tune.tune(imagined)
    tile = _launch.read_table(path)["entries"][0]["tile"]
    monkeypatch.setattr(_launch, "TUNED", imagined)
    monkeypatch.setattr(_launch, "card_of", lambda device: CARD)
    _plan.forget()
    rule = {"grouped": False, "computed_weights": False}
    gpu = torch.device("cuda", 0)
    assert _launch.gemm_launch("int8_linear", 1, 32, 160, device=gpu, **rule) == tile


def test_a_second_run_goes_on_and_a_new_triton_starts_over(imagined, monkeypatch):
    lines = []
    assert tune.tune(imagined, minutes=0, log=lines.append).exists()  # an empty table
    assert lines == ["out of time: another run goes on from here"]
    path = tune.tune(imagined)
    before = path.read_text()
    tune.tune(imagined, log=lines.append)
    assert path.read_text() == before and len(lines) == 1  # nothing was left to measure
    monkeypatch.setattr(tune, "ROWS", (1,))
    table = json.loads(before)
    path.write_text(json.dumps({**table, "versions": {"torch": "1.0", "triton": "1.0"}}))
    assert len(_launch.read_table(tune.tune(imagined))["entries"]) == len(tune.KERNELS)


def test_an_interrupted_write_leaves_the_old_table(imagined, monkeypatch):
    path = tune.tune(imagined)
    before = path.read_text()

    def fail(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(path), "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        tune.write_table(path, {"entries": []})
    assert path.read_text() == before


def test_a_tile_that_computes_something_else_is_not_chosen(imagined, monkeypatch):
    monkeypatch.setattr(tune, "_close", lambda got, want: False)
    for entry in _launch.read_table(tune.tune(imagined))["entries"]:
        assert entry["us"] == entry["before_us"] == 10.0


def test_a_shape_that_fails_is_kept_with_its_error_and_tried_again(imagined, monkeypatch):
    def broken(calls):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(tune, "microseconds", broken)
    table = _launch.read_table(tune.tune(imagined))
    assert table["entries"] == [] and len(table["failed"]) == 2 * len(tune.KERNELS)
    assert all("illegal memory access" in entry["error"] for entry in table["failed"])
    monkeypatch.setattr(tune, "microseconds", clock)
    table = _launch.read_table(tune.tune(imagined))
    assert table["failed"] == [] and len(table["entries"]) == 2 * len(tune.KERNELS)


def test_another_process_goes_on_behind_the_shape_that_lost_the_device(imagined, monkeypatch):
    def broken(calls):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(tune, "microseconds", broken)
    monkeypatch.setattr(tune, "answers", lambda device: False)
    with pytest.raises(tune.DeviceLostError, match="illegal memory access"):
        tune.tune(imagined)
    monkeypatch.undo()
    monkeypatch.setattr(tune, "_this_gpu", lambda: (torch.device("cpu"), CARD))
    monkeypatch.setattr(tune, "microseconds", clock)
    monkeypatch.setattr(tune, "linear_calls", lambda *_: [lambda: torch.ones(1)])
    shapes = [(kernel, 1, 32, 160) for kernel in tune.KERNELS]
    table = _launch.read_table(tune.tune(imagined, shapes=shapes))
    assert len(table["failed"]) == 1 and len(table["entries"]) == len(tune.KERNELS) - 1


def test_a_measurement_takes_thirty_milliseconds_in_all():
    for once in (1e-4, 0.01, 0.4, 3.0, 50.0):
        rounds = tune.ROUNDS * tune.repeats(once, tune.ROUNDS) * max(once, 1e-3)
        assert rounds >= tune.LEAST


def test_what_a_compiler_refuses_is_told_from_other_errors():
    assert tune._refused(RuntimeError("PassManager::run failed"))


def test_results_are_compared_by_size():
    want = torch.randn(5, 7)
    assert tune._close(want * (1 + 2**-9), want)
    assert not tune._close(want.flip(0), want)
    assert not tune._close(torch.full_like(want, float("nan")), want)


@pytest.mark.parametrize("M", tune.ROWS)
@pytest.mark.parametrize("kernel", tune.KERNELS)
def test_candidates_are_tiles_and_keep_to_the_rules(kernel, M):
    tiles = list(tune.candidates(kernel, M))
    assert tiles
    unpacks = "W4" in kernel or "A16" in kernel
    for tile in tiles:
        assert all(value in _launch.TILE[name] for name, value in tile.items())
        if unpacks and tile["SWAP"]:  # a left operand from registers: not to wgmma
            assert tile["num_warps"] <= 2
        if "W4A4" in kernel and not tile["SWAP"]:
            assert tile["BLOCK_M"] < 64


@pytest.mark.parametrize("kernel", tune.KERNELS)
def test_a_round_of_calls_reads_memory_of_its_own(kernel, monkeypatch):
    monkeypatch.setattr(tune, "rounds_of", lambda bytes_: 3)
    calls = tune.linear_calls(kernel, 2, 32, 160, torch.device("cpu"))
    results = [call() for call in calls]
    assert len(calls) == 3 and torch.equal(results[0], results[2])
    inputs = [dict(zip(c.__code__.co_freevars, c.__closure__, strict=True)) for c in calls]
    for name in ("x", "w"):
        assert len({cells[name].cell_contents.data_ptr() for cells in inputs}) == 3


def test_rounds_outgrow_the_cache():
    assert tune.rounds_of(tune.L2) == 2 and tune.rounds_of(1) == tune.MOST
    for N, K in tune.widths():
        assert tune.rounds_of(N * K / 2) * N * K / 2 > 60e6  # the second cache of an H200
    assert sorted(tune.widths()) == sorted(set(tune.widths())) and len(tune.widths()) == 18


def test_the_command_prints_the_table(imagined, monkeypatch):
    from qtk.cli import app

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune, "KERNELS", ("int8_linear",))
    result = CliRunner().invoke(app, ["tune", "--out", str(imagined), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"table": str(imagined / "sm_90_132_imagined_gpu.json")}
    assert "first call" in result.stderr
