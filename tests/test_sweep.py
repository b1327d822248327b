"""Schemes times models: measured once, kept, gone on with, here and on Ray."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from qtk.demo.sentences import sentences
from qtk.errors import BackendError, SchemeError
from qtk.sweep import engine, plan, table
from tests.test_cli import call

CONFIG = """
models = ["{model}"]
calib = "{text}"
data = "{text}"
samples = 16
seed = 3

[schemes.w8a8]
preset = "fast"

[schemes.w4a8]
w = 4
preset = "fast"

[schemes.impossible]
w = 4
group_size = 100000
"""


@pytest.fixture
def config(tiny_bert: Path, tmp_path: Path) -> Path:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(sentences(40)))
    (tmp_path / "config.toml").write_text(CONFIG.format(model=tiny_bert, text=text))
    return tmp_path / "config.toml"


def test_a_sweep_leaves_tables_a_page_and_goes_on_where_it_was(config, tmp_path, monkeypatch):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    out = tmp_path / "out"
    measure, done = engine.measure, []

    def interrupted(cell):
        done.append(cell.scheme)
        if len(done) == 2:
            raise KeyboardInterrupt
        return measure(cell)

    monkeypatch.setattr(engine, "measure", interrupted)
    assert call("sweep", config, "--out", out).exit_code != 0
    result = call("sweep", config, "--out", out, "--json")
    assert result.exit_code == 0, result.output
    assert done == ["w8a8", "w4a8", "w4a8", "impossible"]
    rows = json.loads(result.stdout)["rows"]
    assert [row["scheme"] for row in rows] == ["w8a8", "w4a8", "impossible"]
    assert "group_size=100000" in rows[2]["error"] and rows[2]["bytes"] is None
    eight, four = rows[:2]
    assert eight["sqnr"] > four["sqnr"] and eight["bytes"] > four["bytes"] and four["ms"] > 0
    for row in rows:
        assert row["seed"] == 3 and row["qtk"] and row["torch"] and row["transformers"]
    written = [pandas.read_csv(out / "results.csv"), pandas.read_parquet(out / "results.parquet")]
    for frame in written:
        assert list(frame["scheme"]) == ["w8a8", "w4a8", "impossible"]
        assert not frame["pareto"][2] and {"commit", "key", "cpu"} <= set(frame.columns)
    text = (out / "report.html").read_text()
    assert "w4a8" in text and "<svg" in text and "<script" not in text
    again = call("sweep", config, "--out", out, "--json")
    assert json.loads(again.stdout)["rows"] == rows and len(done) == 4


def test_other_data_or_options_are_other_cells(config):
    first = {cell.key for cell in plan.read(config)}
    assert len(first) == 3
    for old, new in (("w = 4\npreset", "w = 5\npreset"), ("seed = 3", "seed = 4")):
        changed = config.with_name("changed.toml")
        changed.write_text(config.read_text().replace(old, new))
        assert first != {cell.key for cell in plan.read(changed)}
    text = config.with_name("text.txt")
    text.write_text("\n".join(sentences(41)))
    assert not first & {cell.key for cell in plan.read(config)}


@pytest.mark.parametrize("text, told", [
    ("models = 5", "models = 5"),
    ("model = []", "a sweep has"),
    ('models = ["x"]\ndata = "y"', "has no schemes"),
    ('models = ["x"]\ndata = "y"\n[schemes.a]\nbit = 4', "bit, which is no option"),
    ("[", "cannot be read"),
])  # fmt: skip
def test_a_file_that_is_no_plan_is_refused(text, told, tmp_path):
    (tmp_path / "config.toml").write_text(text)
    with pytest.raises(SchemeError, match=told):
        plan.read(tmp_path / "config.toml")


def row(key, sqnr, size, ms, model="m", error=None):
    return {"key": key, "model": model, "sqnr": sqnr, "bytes": size, "ms": ms, "error": error}


def test_the_front_is_what_nothing_beats():
    rows = [
        row("exact", None, 100, 10), row("good", 30, 50, 9), row("worse", 29, 50, 9),
        row("same", 30, 50, 9), row("fast", 10, 60, 1), row("failed", None, 0, 0, error="no"),
        row("other", 5, 500, 500, model="n"),
    ]  # fmt: skip
    assert [r["key"] for r in table.best(rows)] == ["exact", "good", "same", "fast", "other"]


def test_without_ray_the_remedy_is_named(config, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(BackendError, match=r"install qtk\[ray\]"):
        engine.run(plan.read(config), tmp_path / "cells", "local")


def test_two_workers_of_ray_one_of_them_killed(config, tmp_path, monkeypatch):
    ray, psutil = pytest.importorskip("ray"), pytest.importorskip("psutil")
    root = Path(__file__).resolve().parents[1]
    monkeypatch.setenv("PYTHONPATH", f"{root}:{root / 'kernels'}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the workers: on a busy machine threads wait
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    killed = []

    def kill_one():
        while not killed:
            for process in psutil.process_iter(["name", "cmdline"]):
                if "ray::measure" in " ".join(process.info["cmdline"] or [process.info["name"]]):
                    os.kill(process.pid, signal.SIGKILL)
                    killed.append(process.pid)
                    return
            time.sleep(0.01)

    watcher = threading.Thread(target=kill_one, daemon=True)
    watcher.start()
    try:
        rows = engine.run(plan.read(config), tmp_path / "cells", "local")
    finally:
        killed.append(None)
        ray.shutdown()
    assert killed[0] is not None
    here = engine.run(plan.read(config), tmp_path / "here")
    timed = ("ms", "float_ms", "seconds", "threads", "cpu")
    for mine, theirs in zip(here, rows, strict=True):
        assert {k: v for k, v in mine.items() if k not in timed} == {
            k: v for k, v in theirs.items() if k not in timed
        }
