"""qtk steal, in this process."""

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import qtk
from qtk.cli import app
from qtk.models import vit


def call(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    image = pytest.importorskip("PIL.Image")
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    root = tmp_path_factory.mktemp("steal")
    torch.manual_seed(0)
    names = {0: "dark", 1: "light"}
    config = ViTConfig(**{**vit.tiny()[0].config.to_dict(), "id2label": names,
                          "label2id": {"dark": 0, "light": 1}})  # fmt: skip
    model = ViTForImageClassification(config).eval()
    model.save_pretrained(root / "float")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(root / "float")
    rng = np.random.default_rng(0)
    for folder in ("test/dark", "test/light", "more/all", "photographs/all"):
        (root / folder).mkdir(parents=True)
        for i in range(12):
            pixels = rng.integers(0, 128, (16, 16, 3)) + 127 * folder.endswith("light")
            image.fromarray(pixels.astype(np.uint8)).save(root / folder / f"{i}.png")
    qmodel = qtk.quantize(model, w=4, a=8, calib=root / "more", tokenizer=root / "float",
                          preset="fast", progress=False)  # fmt: skip
    qmodel.save_pretrained(root / "quantized")
    return root


def test_steal_reads_folders_of_images_and_writes_a_page(folders, tmp_path):
    result = call(
        "steal", folders / "float", folders / "quantized", "--test", folders / "test",
        "--inside", folders / "more", "--outside", folders / "photographs", "--budget", 8,
        "--epochs", 1, "--seeds", 1, "--answers", "hard", "--html", tmp_path / "page.html",
        "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert [(row["pool"], row["victim"]) for row in rows] == [
        (pool, victim) for pool in ("in", "photographs") for victim in ("float", "quantized")
    ]
    assert all(row["queries"] == 8 for row in rows) and (tmp_path / "page.html").exists()


def test_steal_wants_classes_in_the_test_images(folders):
    result = call(
        "steal", folders / "float", folders / "quantized", "--test", folders / "more",
        "--inside", folders / "more", "--outside", folders / "photographs",
    )  # fmt: skip
    assert result.exit_code == 1 and "without a class of the model" in result.output
