"""The report of several bit widths, its findings, and the command line."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import qtk
from qtk.cli import app
from qtk.robust import write_report
from qtk.robust.findings import findings
from qtk.robust.result import Check, Robustness, compare

N = 200


def bits_of(share):
    return (np.arange(N) < round(share * N)).astype(np.int8)


def row(name, kind, level, first, second, base=(0.9, 0.9)):
    pair, clean = ((bits_of(a), bits_of(b)) for a, b in ((first, second), base))
    return compare(name, kind, level, None, pair, clean, 0)


def study(bits, worst, noise, corrupt=(), floor=0.01):
    """A study of which all is known."""
    rows = [
        row("clean", "clean", "", 0.9, 0.9), row("worst case", "worst", "mid", *worst),
        row("resize", "system", "pillow nearest", *noise),
        row("resize", "system", "pillow box", 0.85, 0.85),
        *(row(name, "corruption", "3", share, share) for name, share in corrupt),
    ]  # fmt: skip
    floors = dict.fromkeys(("worst", "system", "corruption"), floor)
    rows = [replace(r, floor=floors.get(r.kind)) for r in rows]
    checks = (Check("more steps", "quantized", True, "fine"),)
    return Robustness(
        N, 0, "straight-through", ("all",), tuple(rows), checks, floors, (), 1.0, bits
    )


CORRUPT = (("impulse_noise", 0.2), ("glass_blur", 0.3), ("fog", 0.5), ("brightness", 0.8))


def test_findings_follow_from_the_rows():
    as_claimed = {
        "W8A8": study(8, (0.2, 0.25), (0.8, 0.78), CORRUPT),
        "W4A4": study(4, (0.2, 0.40), (0.8, 0.60), CORRUPT),
    }
    assert [f.holds for f in findings(as_claimed)] == [True] * 5
    reverse = {
        "W8A8": study(8, (0.2, 0.15), (0.7, 0.88), CORRUPT),
        "W4A4": study(4, (0.2, 0.05), (0.7, 0.9), [(n, 1 - s) for n, s in CORRUPT]),
    }
    held = [f.holds for f in findings(reverse)]
    assert held[:3] == [False] * 3 and held[4] is False
    same = {"W8A8": study(8, (0.2, 0.205), (0.8, 0.8), floor=0.02)}
    assert [f.holds for f in findings(same)] == [None, None, None, None, True]
    failed = replace(same["W8A8"], checks=(Check("noise", "quantized", False, "noise is better"),))
    first = findings({"W8A8": failed})[0]
    assert first.holds is None and "gradients masked?" in first.told


def test_a_report_has_a_row_a_bit_width(tmp_path):
    studies = {
        "W8A8": study(8, (0.2, 0.25), (0.8, 0.78), CORRUPT),
        "W4A4 <small>": study(4, (0.2, 0.40), (0.8, 0.60), CORRUPT),
    }
    files = write_report(studies, tmp_path / "out")
    html, markdown, told = (file.read_text() for file in files)
    assert html.count("<h2>") == 4 and "W4A4 &lt;small&gt;" in html and "<script" not in html
    assert (
        "| W8A8 | 90.0 | 25.0 (mid) |" in markdown and "| float | 90.0 | 20.0 (mid) |" in markdown
    )
    kept = json.loads(told)
    assert list(kept["models"]) == list(studies) and len(kept["findings"]) == 5
    assert not [file for file in (tmp_path / "out").iterdir() if file not in files]
    with pytest.raises(qtk.SchemeError, match="one study"):
        write_report({}, tmp_path)


def test_the_command_line_compares_models_that_were_saved(tmp_path):
    image = pytest.importorskip("PIL.Image")
    from transformers import ViTImageProcessorPil

    from qtk.models import vit

    torch.manual_seed(0)
    model, batch = vit.tiny()
    model.save_pretrained(tmp_path / "float")
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    processor.save_pretrained(tmp_path / "float")
    for bits in (8, 4):
        qmodel = qtk.quantize(model, w=bits, a=bits, calib=[batch], progress=False)
        qmodel.save_pretrained(tmp_path / f"W{bits}")
    for label, name in enumerate(list(model.config.id2label.values())[:2]):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(3):
            colour = (60 * i, 200 * label, 90)
            image.new("RGB", (16, 16), colour).save(tmp_path / "images" / name / f"{i}.png")
    command = [
        "robust", f"{tmp_path / 'float'}", f"{tmp_path / 'W8'}", f"{tmp_path / 'W4'}",
        "--data", f"{tmp_path / 'images'}", "--suite", "noise", "--suite", "apgd_ce",
        "--steps", "2", "--budget", "mid",
        "--out", f"{tmp_path / 'out'}", "--resume", f"{tmp_path / 'kept'}",
    ]  # fmt: skip
    done = CliRunner().invoke(app, [*command, "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert list(told["models"]) == ["W8", "W4"] and told["models"]["W4"]["bits"] == 4
    assert len(told["files"]) == 3 and (tmp_path / "out" / "report.html").exists()
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 0 and "worst case mid" in again.stdout and "written:" in again.stdout
    wrong = CliRunner().invoke(app, [*command[:4], *command[4:6], "--suite", "pgd"])
    assert wrong.exit_code == 1 and "choose among" in wrong.output


def test_a_text_file_has_its_classes_after_a_tab(tmp_path):
    from qtk.commands.trust import _pairs_of_text

    file = tmp_path / "texts.tsv"
    file.write_text("a good film\t1\nan odd\tone\tneg\n")
    assert _pairs_of_text(file) == [("a good film", 1), ("an odd\tone", "neg")]
    file.write_text("no class\n")
    with pytest.raises(qtk.SchemeError, match="line 1: no tab"):
        _pairs_of_text(file)
