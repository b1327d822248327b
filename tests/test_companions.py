"""The files beside a model's weights: what is copied, and what is never touched."""

import json
import os
from pathlib import Path

import pytest

import qtk
from qtk.integrations.companions import copy_companions


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("words")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text("weights")
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def modules(folder: Path, *paths: str) -> None:
    listed = [{"idx": i, "path": path} for i, path in enumerate(paths)]
    (folder / "modules.json").write_text(json.dumps(listed))
    for path in paths:
        if path and ".." not in path and not path.startswith("/"):
            (folder / path).mkdir(parents=True)
            (folder / path / "config.json").write_text(path)


def test_weights_and_config_stay(source: Path, out: Path) -> None:
    assert copy_companions(source, out) == ["tokenizer.json"]
    assert [path.name for path in out.iterdir()] == ["tokenizer.json"]


def test_every_folder_that_modules_json_names_is_copied(source: Path, out: Path) -> None:
    modules(source, "", "1_Pooling", "2_Dense", "3_Odd")
    (source / "2_Dense" / "model.safetensors").write_text("dense")
    (source / "3_Odd" / "deep").mkdir()
    (source / "3_Odd" / "deep" / "x.bin").write_text("deep")
    (source / "4_Unnamed").mkdir()
    (source / "4_Unnamed" / "x").write_text("no")
    copied = copy_companions(source, out)
    assert {"1_Pooling/config.json", "2_Dense/model.safetensors", "3_Odd/deep/x.bin"} <= {*copied}
    assert (out / "2_Dense" / "model.safetensors").read_text() == "dense"
    assert not (out / "4_Unnamed").exists() and not (out / "config.json").exists()


@pytest.mark.parametrize("path", ["../secret", "/etc", "..", "a/../../secret"])
def test_modules_json_names_nothing_outside_the_model(path: str, source: Path, out: Path) -> None:
    (source.parent / "secret").mkdir()
    (source.parent / "secret" / "key").write_text("secret")
    (source / "a").mkdir()
    modules(source, path)
    with pytest.raises(qtk.ModelError, match="outside"):
        copy_companions(source, out)
    assert not list(out.rglob("key"))


@pytest.mark.parametrize("text", ["no JSON", "{}", '[{"path": 3}]', "[1]"])
def test_a_modules_json_that_says_nothing_is_named(text: str, source: Path, out: Path) -> None:
    (source / "modules.json").write_text(text)
    with pytest.raises(qtk.ModelError, match=r"modules\.json"):
        copy_companions(source, out)


def test_no_link_is_followed_out_of_the_model(source: Path, out: Path) -> None:
    secret = source.parent / "secret"
    secret.mkdir()
    (secret / "key").write_text("secret")
    (source / "vocab.txt").symlink_to(secret / "key")
    modules(source, "1_Pooling")
    (source / "1_Pooling" / "key").symlink_to(secret / "key")
    (source / "1_Pooling" / "all").symlink_to(secret)
    with pytest.raises(qtk.ModelError, match="leads out of"):
        copy_companions(source, out)
    assert "secret" not in {path.read_text() for path in out.rglob("*") if path.is_file()}


def test_links_inside_a_cache_of_the_hub_are_followed(source: Path, out: Path) -> None:
    snapshot = source.parent / "models--org--name" / "snapshots" / "abc"
    blob = source.parent / "models--org--name" / "blobs" / "123"
    snapshot.mkdir(parents=True), blob.parent.mkdir()
    blob.write_text("words")
    (snapshot / "tokenizer.json").symlink_to(os.path.relpath(blob, snapshot))
    assert copy_companions(snapshot, out) == ["tokenizer.json"]
    assert (out / "tokenizer.json").read_text() == "words"
    assert not (out / "tokenizer.json").is_symlink()


def test_no_link_in_out_is_written_through(source: Path, out: Path) -> None:
    precious = source.parent / "precious"
    precious.mkdir()
    (precious / "file").write_text("precious")
    (out / "tokenizer.json").symlink_to(precious / "file")
    copy_companions(source, out)
    assert (precious / "file").read_text() == "precious"
    assert (out / "tokenizer.json").read_text() == "words"
    assert not (out / "tokenizer.json").is_symlink()
    modules(source, "1_Pooling")
    (out / "1_Pooling").symlink_to(precious)
    with pytest.raises(qtk.ModelError, match="is a link"):
        copy_companions(source, out)
    assert [path.name for path in precious.iterdir()] == ["file"]
