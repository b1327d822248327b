"""Uploading to the hub: what goes up is the sealed folder, never a model on its way there."""

import shutil

import huggingface_hub
import pytest
import torch
from safetensors import safe_open

import qtk
from qtk.integrity import SUMS
from tests.zoo import build


class Hub:
    """A hub that is a folder."""

    def __init__(self, root):
        self.root, self.calls = root, []

    def __call__(self, token=None):
        self.token = token
        return self

    def create_repo(self, repo_id, private=None, exist_ok=False):
        self.calls.append((repo_id, private))
        return type("Url", (), {"repo_id": f"me/{repo_id}"})

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, **told):
        self.told = told
        for name in allow_patterns:
            (self.root / repo_id / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder_path / name, self.root / repo_id / name)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    fake = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", fake)
    return fake


def test_what_is_uploaded_is_sealed_and_loads(hub, tmp_path):
    model, batch = build("BertModel")
    qmodel = qtk.quantize(model, 8, 8, calib=[batch], progress=False)
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "notes.txt").write_text("mine")
    qmodel.save_pretrained(
        tmp_path / "small", push_to_hub=True, private=True, token="secret", commit_message="eight"
    )
    assert hub.calls == [("small", True)] and hub.token == "secret"
    assert hub.told["commit_message"] == "eight" and not hub.told["create_pr"]
    up = hub.root / "me" / "small"
    assert {p.name for p in up.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    with safe_open(up / "model.safetensors", "pt") as file:
        assert SUMS in file.metadata()
    with torch.no_grad():
        assert torch.equal(qtk.load(up)(**batch)[0], qmodel(**batch)[0])


def test_a_save_that_fails_uploads_nothing(hub, tmp_path, monkeypatch):
    model, batch = build("BertModel")
    qmodel = qtk.quantize(model, 8, 8, calib=[batch], progress=False)

    def broken(work):
        raise OSError("the disk is full")

    monkeypatch.setattr("qtk.integrations.saving.seal", broken)
    with pytest.raises(OSError, match="full"):
        qmodel.save_pretrained(tmp_path / "small", push_to_hub=True)
    assert hub.calls == [] and not hub.root.exists()
