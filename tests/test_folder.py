"""The gate of `qtk.load`: what a folder may say, and what becomes of one that says otherwise."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import qtk
from qtk.integrations.transformers import record_of
from tests.zoo import build


def quantized(**options):
    model, batch = build("BertForSequenceClassification")
    return qtk.quantize(model, calib=[batch], progress=False, **options), batch


@torch.no_grad()
def output(model, batch):
    return model(**batch)[0]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A folder, a batch and what the model in it computes."""
    qmodel, batch = quantized(w=4, a=8)
    folder = tmp_path_factory.mktemp("saved")
    qmodel.save_pretrained(folder)
    return folder, batch, output(qmodel, batch)


@pytest.fixture
def folder(pristine, tmp_path):
    """A copy to be damaged."""
    shutil.copytree(pristine[0], tmp_path / "model")
    return tmp_path / "model"


def edit(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def first(tensors, leaf):
    return next(name for name in sorted(tensors) if name.endswith(leaf))


# --- config.json

BAD_CONFIGS = {
    "hidden_size": ["x", -1, 10**400, 10**9],
    "num_hidden_layers": [10**6, 10**9, -1, 2.5, "2", None, 10**400],
    "num_attention_heads": [0, -2, "2", 5],
    "architectures": [5, [5], [["BertModel"]], ["os"], {}],
    "model_type": ["evil", 5, [], None],
    "num_labels": [10**9],
    "id2label": [5, "x", {"a": "b"}],
    "vocab_size": [10**12, 5],
    "hidden_act": ["none", 5],
    "intermediate_size": [3],
    "type_vocab_size": [-3],
}


@pytest.mark.parametrize(
    "name, value", [(n, v) for n, vs in BAD_CONFIGS.items() for v in vs], ids=repr
)
def test_a_config_that_cannot_be_is_a_checkpoint_error(folder, name, value):
    edit(folder, **{name: value})
    with pytest.raises(qtk.CheckpointError):
        qtk.load(folder)


ODD = [None, True, -1, 0, 10**400, 1.5, "x", [], {"a": 1}]


def test_any_value_in_any_field_of_the_config_is_believed_or_refused(pristine, folder):
    config = json.loads((folder / "config.json").read_text())
    for name in config:
        for value in ODD:
            edit(folder, **{**config, name: value})
            try:
                qtk.load(folder)
            except qtk.QtkError:
                continue


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a": %s}' % ("9" * 5000), "{", "\x00", "[]", "5"]
)
def test_json_that_is_none_or_is_meant_to_hurt_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(qtk.CheckpointError, match=r"not valid JSON|not saved by qtk"):
        qtk.load(folder)


def test_a_config_of_many_layers_is_refused_by_the_files_size(folder):
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    layer = next(iter(config["layers"].values()))
    config["layers"] = {f"encoder.layer.{i}": layer for i in range(5000)}
    edit(folder, quantization_config=config)
    with pytest.raises(qtk.CheckpointError, match="lists 5000 quantized layers, the file only"):
        qtk.load(folder)


# --- whose code, whose files

EVIL = """
from transformers import BertConfig, BertModel
open({marker!r}, "w").write("ran")
class Evil(BertModel): pass
class EvilConfig(BertConfig): model_type = "evil"
"""


def test_no_code_of_a_checkpoint_runs(folder, tmp_path, monkeypatch):
    def asked(*args):
        raise AssertionError("asked whether to run it")

    monkeypatch.setattr("builtins.input", asked)
    marker = tmp_path / "ran"
    (folder / "evil.py").write_text(EVIL.format(marker=str(marker)))
    auto = {"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.Evil"}
    evil = {"auto_map": auto, "architectures": ["Evil"]}
    for changes in ({"auto_map": auto}, evil, {**evil, "model_type": "evil"}):
        edit(folder, **changes)
        for read in (qtk.load, qtk.quantize):
            try:
                read(folder)
            except qtk.QtkError:
                continue
    assert not marker.exists()


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation",
                                 "_attn_implementation_internal"])  # fmt: skip
def test_a_config_does_not_choose_the_attention(pristine, folder, key):
    edit(folder, **{key: "owner/kernel"})
    assert torch.equal(output(qtk.load(folder), pristine[1]), pristine[2])


def test_the_caller_chooses_it(pristine):
    model = qtk.load(pristine[0], attn_implementation="eager", dtype="float32")
    assert model.config._attn_implementation == "eager"
    assert torch.allclose(output(model, pristine[1]), pristine[2], atol=1e-4)


def test_the_tokenizer_is_looked_for_where_the_model_was(pristine):
    assert qtk.load(pristine[0]).config._name_or_path == str(pristine[0])


@pytest.fixture
def shards(tmp_path):
    quantized(w=4, a=8)[0].save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    return tmp_path / "shards"


def edit_index(folder, change):
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    file.write_text(json.dumps(change(index)))


@pytest.mark.parametrize("name", [
    "../other/x.safetensors", "/tmp/x.safetensors", "../../../../etc/shadow", "", ".",
    "config.json", "sub/x.safetensors", "missing.safetensors", 5, None, ["x"],
])  # fmt: skip
def test_shards_lie_in_the_folder(shards, name):
    (shards.parent / "other").mkdir()
    (shards / "sub").mkdir()
    for place in (shards.parent / "other", shards / "sub"):
        shutil.copy(next(shards.glob("*.safetensors")), place / "x.safetensors")

    def change(index):
        key = next(iter(index["weight_map"]))
        return {**index, "weight_map": {**index["weight_map"], key: name}}

    edit_index(shards, change)
    with pytest.raises(qtk.CheckpointError, match=r"no \.safetensors file in it"):
        qtk.load(shards)


@pytest.mark.parametrize("index", [[], {}, {"weight_map": []}, {"weight_map": None}])
def test_an_index_without_places_is_refused(shards, index):
    edit_index(shards, lambda _: index)
    with pytest.raises(qtk.CheckpointError, match="no weight_map"):
        qtk.load(shards)


def test_links_to_files_are_followed_and_to_devices_are_not(pristine, folder, shards):
    file = folder / "model.safetensors"
    file.rename(folder.parent / "blob")
    file.symlink_to(folder.parent / "blob")
    assert torch.equal(output(qtk.load(folder), pristine[1]), pristine[2])
    for place in (folder / "model.safetensors", folder / "config.json"):
        place.unlink()
        os.mkfifo(place)
        with pytest.raises(qtk.CheckpointError, match=r"no \.safetensors|no config\.json"):
            qtk.load(folder)
    shard = next(iter(sorted(shards.glob("*.safetensors"))))
    shard.unlink()
    shard.symlink_to("/dev/zero")
    with pytest.raises(qtk.CheckpointError, match=r"no \.safetensors file in it"):
        qtk.load(shards)


# --- tensors


def filled(leaf, value):
    def change(tensors):
        tensors[first(tensors, leaf)].view(-1)[0] = value

    return change


def cast(leaf, dtype):
    def change(tensors):
        name = first(tensors, leaf)
        tensors[name] = tensors[name].to(dtype)

    return change


BROKEN = {
    "nan in a norm": (filled("LayerNorm.weight", torch.nan), "LayerNorm.weight holds nan"),
    "nan in the embeddings": (filled("word_embeddings.weight", torch.nan), "holds nan"),
    "inf in the head": (filled("classifier.bias", torch.inf), "classifier.bias holds nan or inf"),
    "an input's zero point": (filled("input_zero_point", 2_000_000_000), "outside -128 to 127"),
    "another": (filled("input_zero_point", -300), "outside -128 to 127"),
    "codes as floats": (cast("query.weight", torch.float32), "codes of .*F32"),
    "codes as int8 where they are packed": (cast("query.weight", torch.int8), "codes of .*I8"),
    "a scale in half": (cast("weight_scale", torch.float16), "weight_scale is F16 in the file"),
    "a zero point as a float": (cast("input_zero_point", torch.float32), "not I32"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_every_tensor_is_looked_at(folder, name):
    change, told = BROKEN[name]
    edit_tensors(folder, change)
    with pytest.raises(qtk.CheckpointError, match=told):
        qtk.load(folder)


def test_zero_points_of_weights_and_clips_of_tokens_are_looked_at(tmp_path):
    for options, leaf, value, told in (
        ({"w": 4, "a": 16, "weights": "asymmetric"}, "weight_zero_point", 127, "outside -8 to 7"),
        ({"activations": "token"}, "input_clip", 7.0, "is 7, a share of a token's maximum"),
    ):
        quantized(**options)[0].save_pretrained(tmp_path)
        edit_tensors(tmp_path, filled(leaf, value))
        with pytest.raises(qtk.CheckpointError, match=told):
            qtk.load(tmp_path)


# --- backends


@pytest.mark.parametrize("options", [{}, {"w": 4, "a": 4, "attention": "int8"}], ids=str)
def test_a_model_loads_on_another_backend(options, tmp_path):
    qmodel, batch = quantized(backend="cpu", **options)
    reference, _ = quantized(backend="reference", **options)
    qmodel.save_pretrained(tmp_path)
    loaded = qtk.load(tmp_path, backend="reference")
    reference.load_state_dict(qmodel.state_dict())
    assert torch.equal(output(loaded, batch), output(reference, batch))
    assert record_of(loaded).backend == "reference"
    names = {layer.kernel for layer in qtk.summary(loaded).layers}
    assert names == {layer.kernel for layer in qtk.summary(reference).layers}
    loaded.save_pretrained(tmp_path / "again")
    assert record_of(qtk.load(tmp_path / "again")).backend == "reference"


def test_a_backend_that_is_not_is_refused(pristine):
    with pytest.raises(qtk.BackendError, match="chooses by device"):
        qtk.load(pristine[0], backend="cuda")


# --- layouts before this one


@pytest.mark.parametrize("options", [{}, {"attention": "int8", "softmax": "code"}], ids=str)
def test_a_folder_of_an_older_layout_computes_what_it_did(options, tmp_path):
    """Groups longer than a row, no recipe of a layer's own, nothing of learning."""
    qmodel, batch = quantized(w=4, a=8, **options)
    qmodel.save_pretrained(tmp_path)
    old = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    old["version"] = 2 if options else 1
    del old["recipe"]["learning"]
    for layer in old["layers"].values():
        del layer["recipe"]
        layer["scheme"]["w"].update({"granularity": "group", "group_size": 128})
    edit(tmp_path, quantization_config=old)
    loaded = qtk.load(tmp_path, verify=False)
    assert torch.equal(output(loaded, batch), output(qmodel, batch))
    assert all(layer.recipe is None for layer in qtk.summary(loaded).layers)


# --- saving


def test_saving_deletes_no_file_of_others(tmp_path):
    qmodel, batch = quantized()
    qmodel.save_pretrained(tmp_path, max_shard_size="20KB")
    theirs = {"lora.safetensors": b"x", "lora.safetensors.index.json": b"{}", "notes.txt": b"y"}
    for name, content in theirs.items():
        (tmp_path / name).write_bytes(content)
    qmodel.save_pretrained(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in theirs} == theirs
    assert sorted(p.name for p in tmp_path.glob("model*")) == ["model.safetensors"]
    assert torch.equal(output(qtk.load(tmp_path), batch), output(qmodel, batch))


def test_an_old_index_cannot_name_files_elsewhere(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "mine.safetensors").write_bytes(b"x")
    index = {"weight_map": {"a": "../mine.safetensors", "b": 5, "c": None}}
    (tmp_path / "out" / "model.safetensors.index.json").write_text(json.dumps(index))
    quantized()[0].save_pretrained(tmp_path / "out")
    assert (tmp_path / "mine.safetensors").read_bytes() == b"x"


@pytest.mark.parametrize("target", ["", None, 5, b"", "a\0b"])
def test_what_is_no_folder_is_not_saved_into(target, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(qtk.CheckpointError, match=r"no folder to save into|cannot make"):
        quantized()[0].save_pretrained(target)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_folder_that_cannot_be_made_is_a_checkpoint_error():
    with pytest.raises(qtk.CheckpointError, match="cannot make the folder"):
        quantized()[0].save_pretrained("/proc/nowhere/x")
