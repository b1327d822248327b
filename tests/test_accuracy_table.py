"""A table of accuracies: rows are means over draws, and nothing measured is lost."""

import json
from dataclasses import replace

import pytest

from benchmarks.accuracy import table

CASES = [("one", {"w": 8}), ("two", {"w": 16}), ("three", {"w": 4})]


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A table in a folder of its own, and the (bits, seed) that were measured."""
    measured = []

    def measure(options, seed):
        measured.append((options["w"], seed))
        return [options["w"] + seed, 0.5]

    monkeypatch.setattr(table, "read", lambda name: read(tmp_path, name))
    monkeypatch.setattr(table, "write", lambda name, found: write(tmp_path, name, found))
    filled = table.Table(
        "x", "X", ["case", "a", "b"], ["{:.1f}", "{:.2f}"], CASES, measure, "Notes",
        ["float32", "1", ""], table.seeds_where_calibrated,
    )  # fmt: skip
    return filled, measured, tmp_path


def read(folder, name):
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write(folder, name, found):
    (folder / f"{name}.json").write_text(json.dumps(found))


def test_a_row_is_the_mean_over_its_draws(made):
    filled, measured, folder = made
    filled.fill()
    found = read(folder, "x")
    assert found["rows"] == [
        ["float32", "1", ""], ["one", "9.0", "0.50"], ["two", "16.0", "0.50"],
        ["three", "5.0", "0.50"],
    ]  # fmt: skip
    assert measured == [(8, 0), (8, 1), (8, 2), (16, 0), (4, 0), (4, 1), (4, 2)]
    assert "seeds 0, 1, 2; rows without calibration data have one" in found["notes"]


def test_what_was_measured_before_an_interruption_is_not_measured_again(made):
    filled, measured, folder = made

    def stop(options, seed):
        if (options["w"], seed) == (4, 1):
            raise KeyboardInterrupt
        return [0.0, 0.0]

    stopped = replace(filled, measure=stop)
    with pytest.raises(KeyboardInterrupt):
        stopped.fill()
    assert [row[0] for row in read(folder, "x")["rows"]] == ["float32", "one", "two"]
    filled.fill(resume=True)
    assert measured == [(4, 1), (4, 2)]
    assert [row[0] for row in read(folder, "x")["rows"]] == ["float32", "one", "two", "three"]


def test_named_rows_are_measured_and_the_others_kept(made):
    filled, measured, folder = made
    old = [["float32", "1", ""], ["one", "old", "old"], ["three", "old", "old"]]
    write(folder, "x", {"rows": old})  # of a program that kept no figures
    filled.fill(only=["three"])
    assert measured == [(4, 0), (4, 1), (4, 2)]
    assert read(folder, "x")["rows"] == [*old[:2], ["three", "5.0", "0.50"]]
