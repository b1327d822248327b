"""qtk fair, in this process."""

import json

import pytest
import torch
from typer.testing import CliRunner

import qtk
from qtk.cli import app
from qtk.fair import census, classifier
from qtk.fair.rows import Columns

COLUMNS = Columns(census.NAMES[-3:], census.SIZES[-3:], {})


def call(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("fair")
    values, labels = census.draw(560)
    values = values[:, -3:]  # hours, race, sex: 48 rows are possible
    rows, labels = COLUMNS.encode(values), torch.from_numpy(labels)
    model = classifier.train(classifier.bert(COLUMNS), rows[60:], labels[60:], epochs=2)
    model.save_pretrained(root / "float")
    COLUMNS.save(root / "float")
    qmodel = qtk.quantize(model, w=4, a=8, calib=[{"input_ids": rows}], preset="fast",
                          progress=False)  # fmt: skip
    qmodel.save_pretrained(root / "quantized")
    table = torch.cat([COLUMNS.decode(rows), labels[:, None]], 1)[:60].tolist()
    lines = [",".join((*COLUMNS.names, "label")), *(",".join(map(str, row)) for row in table)]
    (root / "rows.csv").write_text("\n".join(lines) + "\n")
    return root


def test_fair_reads_a_table_and_writes_a_page(folders, tmp_path):
    result = call(
        "fair", folders / "float", folders / "quantized", "--rows", folders / "rows.csv",
        "--protected", "sex", "--protected", "race", "--second", folders / "quantized",
        "--probe", "random", "--n", 100, "--html", tmp_path / "page.html", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["samples"] == 60 and data["domain"] == 48
    assert {row["attribute"] for row in data["instances"]} == {"sex", "race"}
    assert all(figure["floor"] in (0, None) for figure in data["figures"])
    assert (tmp_path / "page.html").exists()


def test_fair_says_what_is_missing(folders):
    rows = ("fair", folders / "float", folders / "quantized", "--rows", folders / "rows.csv")
    assert "--protected sex" in call(*rows).output
    assert "no feature 'height'" in call(*rows, "--protected", "height").output
    elsewhere = call(*rows, "--protected", "sex", "--columns", folders / "none.json")
    assert elsewhere.exit_code == 1 and "Columns.save" in elsewhere.output
