"""A saved model is the old or the new one, whole, and what was written is what is read."""

import json
import random
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import qtk
from qtk import integrity
from qtk.integrations.replacement import WHOLE, settle
from qtk.integrations.saving import save
from tests.kills import killed_before
from tests.zoo import build

SHARDS = {"max_shard_size": "20KB"}


@cache
def quantized(name="BertModel", **options):
    model, batch = build(name)
    return qtk.quantize(model, calib=[batch], progress=False, **options), batch


@torch.no_grad()
def output(model, batch):
    return model(**batch)[0]


def tokenizer(folder: Path, text: str, *more: str) -> Path:
    folder.mkdir()
    for name in ("tokenizer.json", *more):
        (folder / name).write_text(text)
    return folder


# --- checksums


def flip(file: Path, name: str) -> None:
    """One bit of one tensor."""
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    begin = start + json.loads(data[8:start])[name]["data_offsets"][0]
    file.write_bytes(data[:begin] + bytes([data[begin] ^ 1]) + data[begin + 1 :])


def test_a_flipped_bit_is_refused_by_name(tmp_path):
    quantized()[0].save_pretrained(tmp_path / "saved")
    for name in sorted(load_file(tmp_path / "saved" / "model.safetensors"))[::9]:
        shutil.copytree(tmp_path / "saved", tmp_path / "bad", dirs_exist_ok=True)
        flip(tmp_path / "bad" / "model.safetensors", name)
        with pytest.raises(qtk.CheckpointError, match=rf"{name} is not what was saved"):
            qtk.load(tmp_path / "bad")


def test_shards_of_two_models_are_refused(tmp_path):
    for folder, w in (("one", 8), ("two", 7)):
        quantized(w=w)[0].save_pretrained(tmp_path / folder, **SHARDS)
    config = tmp_path / "two" / "config.json"
    shutil.copy(tmp_path / "one" / "config.json", config)
    with pytest.raises(qtk.CheckpointError):
        qtk.load(tmp_path / "two")


def test_an_edited_config_is_refused_unless_it_is_meant(tmp_path):
    qmodel, _ = quantized()
    qmodel.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "hidden_act": "relu"}))
    with pytest.raises(qtk.CheckpointError, match=r"config\.json is not the one.*verify=False"):
        qtk.load(tmp_path)
    assert qtk.load(tmp_path, verify=False).config.hidden_act == "relu"
    file.write_text(json.dumps({**config, "transformers_version": "6"}))
    qtk.load(tmp_path)


def test_a_checksum_knows_dtype_and_shape():
    x = torch.arange(6, dtype=torch.int32)
    same = {integrity.checksum(t) for t in (x, x.clone(), x.flip(0).flip(0))}
    others = (x.view(2, 3), x.view(torch.float32), x + 1, x[0], x[:0], x.to(torch.int64))
    assert len(same) == 1 and len(same | {integrity.checksum(t) for t in others}) == 7


# --- replacing a folder


def states(folder: Path) -> tuple[str, ...]:
    """What a folder holds, by the content of each of its files; but of unfinished saves."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and ".saving-" not in str(p))
    return tuple(f"{path.relative_to(folder)} {hash(path.read_bytes())}" for path in files)


@pytest.mark.parametrize("options", [{}, SHARDS], ids=["one file", "shards"])
def test_a_save_killed_before_any_file_operation_leaves_the_old_or_the_new(tmp_path, options):
    sources = [tokenizer(tmp_path / "a", "old", "vocab.txt"), tokenizer(tmp_path / "b", "new")]
    models = [quantized(w=8)[0], quantized(w=4)[0]]
    whole = []
    for i in (0, 1):
        save(models[i], tmp_path / str(i), [sources[i]], **options)
        whole.append(states(tmp_path / str(i)))
    found, out, count, ended = set(), tmp_path / "out", 0, False
    while not ended:
        count += 4 if options else 1  # a shard is handled like another
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(tmp_path / "0", out)
        ended = killed_before(count, out, lambda: save(models[1], out, [sources[1]], **options))
        settle(out)  # as qtk.load begins
        files = states(out)
        assert files in whole, f"killed before operation {count}"
        found.add(whole.index(files))
    assert count > 20 and found == {0, 1}


def test_every_interrupted_save_is_finished_by_whoever_comes_next(tmp_path):
    old, new = quantized(w=8)[0], quantized(w=4)[0]
    old.save_pretrained(tmp_path / "out")
    new.save_pretrained(tmp_path / "new")
    count, met = 1, 0
    while not killed_before(count, tmp_path / "out", lambda: new.save_pretrained(tmp_path / "out")):
        met += (tmp_path / "out" / WHOLE).exists()
        assert qtk.summary(tmp_path / "out").recipe["w"] in (4, 8)
        assert not (tmp_path / "out" / WHOLE).exists()
        shutil.rmtree(tmp_path / "out")
        old.save_pretrained(tmp_path / "out")
        count += 6
    assert met > 1


def test_a_fresh_save_that_is_killed_leaves_nothing_that_loads_or_everything(tmp_path):
    source, out = tokenizer(tmp_path / "source", "words"), tmp_path / "out"
    save(quantized()[0], tmp_path / "whole", [source])
    count = 0
    while not killed_before(count := count + 9, out, lambda: save(quantized()[0], out, [source])):
        try:
            qtk.load(out)
            assert states(out) == states(tmp_path / "whole")
        except qtk.CheckpointError:
            assert not (out / "config.json").exists()
        shutil.rmtree(out, ignore_errors=True)


def test_leftovers_and_pickles_go_and_other_peoples_files_stay(tmp_path):
    out = tmp_path / "out"
    (out / ".saving-old").mkdir(parents=True)
    (out / "pytorch_model.bin").write_bytes(b"stale")
    for name in ("lora.safetensors", "README.md", "notes.txt"):
        (out / name).write_text("mine")
    quantized()[0].save_pretrained(out)
    assert {p.name for p in out.iterdir()} == {
        "config.json", "model.safetensors", "lora.safetensors", "README.md", "notes.txt",
    }  # fmt: skip
    assert (out / "README.md").read_text() == "mine"


def test_a_list_of_old_files_does_not_lead_out_of_the_folder(tmp_path):
    out, precious = tmp_path / "out", tmp_path / "precious"
    quantized()[0].save_pretrained(out)
    precious.write_text("mine")
    (out / WHOLE).mkdir()
    shutil.copy(out / "config.json", out / WHOLE)
    (out / WHOLE / "going.json").write_text(json.dumps(["../precious", str(precious)]))
    qtk.load(out)
    assert precious.read_text() == "mine"


def test_the_card_says_what_was_done_and_its_lines_load_the_model(tmp_path):
    qmodel, batch = quantized(w=4)
    qmodel.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    record = qmodel.config.quantization_config.record
    worst = min(layer.sqnr for layer in record.layers.values())
    assert "12 in W4A8" in text and "gptq" in text.lower() and f"lowest {worst:.1f} dB" in text
    code = text.split("```python")[1].split("```")[0].replace("this/folder", str(tmp_path))
    scope: dict = {}
    exec(code, scope)
    assert torch.equal(output(scope["model"], batch), output(qmodel, batch))


# --- 500 damaged checkpoints

KINDS = ("flip", "flip header", "truncate", "extend", "header", "config", "field")
ODD = [None, True, -1, 0, 3, 10**400, 1.5, "x", "", [], {}, [1], {"a": 1}, float("nan")]


def leaves(value, path=()):
    """Paths of all values in JSON."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, (dict, list)):
            yield from leaves(inner, (*path, key))


def edited(value, draw):
    """JSON with one of its values, names or entries changed."""
    path = draw.choice(list(leaves(value)))
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    how = draw.choice(("odd", "odd", "delete", "near", "other"))
    old = holder[path[-1]]
    if how == "delete":
        del holder[path[-1]]
    elif how == "near" and isinstance(old, int):
        holder[path[-1]] = draw.choice((old + 1, old - 1, old * 2, -old, not old))
    elif how == "other" and isinstance(holder, dict):
        holder[path[-1]] = holder[draw.choice(list(holder))]
    else:
        holder[path[-1]] = draw.choice(ODD)
    return value


def damage(folder: Path, kind: str, draw: random.Random) -> None:
    file, config = folder / "model.safetensors", folder / "config.json"
    data = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    if kind in ("flip", "flip header"):
        place = draw.randrange(*((header, len(data)) if kind == "flip" else (0, header)))
        data[place] ^= 1 << draw.randrange(8)
    elif kind == "truncate":
        del data[draw.randrange(len(data)) :]
    elif kind == "extend":
        data += draw.randbytes(draw.randrange(1, 4096))
    elif kind == "header":
        text = json.dumps(edited(json.loads(data[8:header]), draw)).encode()
        data = bytearray(len(text).to_bytes(8, "little") + text + data[header:])
    elif kind == "config":
        text = bytearray(config.read_bytes())
        text[draw.randrange(len(text))] = draw.randrange(256)
        config.write_bytes(text)
    else:
        config.write_text(json.dumps(edited(json.loads(config.read_text()), draw)))
    file.write_bytes(data)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """Two saved models, with what they compute."""
    found = []
    for name, options in (
        ("BertForSequenceClassification", {"w": 8, "a": 8}),
        ("OPTForCausalLM", {"w": 4, "a": 4, "activations": "token"}),
    ):
        qmodel, batch = quantized(name, **options)
        folder = tmp_path_factory.mktemp("pristine")
        qmodel.save_pretrained(folder)
        found.append((folder, batch, output(qmodel, batch)))
    return found


def mutations(pristine, seeds, tmp_path):
    """Damages one of the models by each seed; a QtkError or the right model may come."""
    told = {"refused": 0, "right": 0}
    for seed in seeds:
        folder, batch, wanted = pristine[seed % 2]
        bad = tmp_path / "bad"
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(folder, bad)
        damage(bad, KINDS[seed % len(KINDS)], random.Random(seed))
        try:
            model = qtk.load(bad)
        except qtk.QtkError:
            told["refused"] += 1
            continue
        assert torch.equal(output(model, batch), wanted), f"seed {seed}"
        told["right"] += 1
    return told


def test_a_damaged_checkpoint_is_refused_or_right(pristine, tmp_path):
    told = mutations(pristine, range(0, 500, 7), tmp_path)  # one kind
    told2 = mutations(pristine, range(0, 500, 11), tmp_path)  # all kinds
    assert told["refused"] > 60 and told2["refused"] > 30


@pytest.mark.slow
def test_500_damaged_checkpoints_are_refused_or_right(pristine, tmp_path):
    assert mutations(pristine, range(500), tmp_path)["refused"] > 350
