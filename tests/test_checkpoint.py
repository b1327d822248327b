import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import qtk
from qtk.assembly import quantized_layers
from tests.zoo import ZOO, build

ROOT = Path(__file__).resolve().parents[1]

SCHEMES = {
    "w8a8": {},
    "w8a8_token": {"activations": "token"},
    "w4a4": {"w": 4, "a": 4},
    "w4a16_g32": {"w": 4, "a": 16, "group_size": 32},
    "w4a16_asymmetric": {"w": 4, "a": 16, "group_size": 32, "weights": "asymmetric"},
    "w3a6": {"w": 3, "a": 6},
    "mixed": {"bits": {"*.0.*out*": (4, 4), "*.0.*": (2, 8), "*.1.*k*": (8, 16)}},
    "skip": {"skip": ["*.1.*"]},
    "no_data": {"calib": None},
    "rotated": {"w": 4, "a": 4, "method": "rotate"},
    "gptq": {"w": 4, "a": 8, "rounding": "gptq", "group_size": 16},
}
CASES = [
    *((name, "w8a8", "float32") for name in ZOO),
    *((n, scheme, "float32") for n in ("BertModel", "OPT350m") for scheme in list(SCHEMES)[1:]),
    ("OPTForCausalLM", "w4a4", "float32"),
    ("ViTForImageClassification", "w4a4", "float32"),
    *((n, s, "bfloat16") for n in ("BertModel", "OPTForCausalLM", "ViTForImageClassification")
      for s in ("w8a8", "w8a8_token", "w4a16_g32")),
]  # fmt: skip
IDS = ["-".join(case) for case in CASES]

READER = """
import sys, torch, transformers
from pathlib import Path
if sys.argv[1] == "with":
    import qtk
for folder in map(Path, sys.argv[2:]):
    torch.manual_seed(5)
    cls, batch = torch.load(folder / "question.pt")
    answer = {}
    for reader in (cls, "AutoModel") if sys.argv[1] == "without" else (cls,):
        try:
            model = getattr(transformers, reader).from_pretrained(folder)
            with torch.no_grad():
                answer = {"y": model(**batch)[0], **model.state_dict()}
        except Exception as error:
            answer[reader] = f"{type(error).__name__}: {error}"
    torch.save(answer, folder / f"{sys.argv[1]}.pt")
"""


def quantized(name, scheme="w8a8", dtype="float32", **more):
    model, batch = build(name, getattr(torch, dtype))
    options = {"calib": [batch], "progress": False, **SCHEMES[scheme], **more}
    return qtk.quantize(model, **options), batch


@torch.no_grad()
def output(model, batch):
    return model(**batch)[0]


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert [k for k in a if a[k].dtype != b[k].dtype or not torch.equal(a[k], b[k])] == []


def read_elsewhere(how: str, folders) -> None:
    """Loads the folders in a new process that has, or has not, imported qtk."""
    path = [str(ROOT), str(ROOT / "kernels")]
    command = f"import sys; sys.path[:0] = {path!r}\n{READER}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", command, how, *map(str, folders)]
    subprocess.run(words, check=True, env=environment, capture_output=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Every case on disk, read by another process; {case: (folder, output, state)}."""
    root, found = tmp_path_factory.mktemp("saved"), {}
    for case, label in zip(CASES, IDS, strict=True):
        qmodel, batch = quantized(*case)
        folder = root / label
        qmodel.save_pretrained(folder)
        torch.save((type(qmodel).__name__, batch), folder / "question.pt")
        state = {k: v.clone() for k, v in qmodel.state_dict().items()}
        found[label] = folder, output(qmodel, batch), state
    read_elsewhere("with", [folder for folder, *_ in found.values()])
    return found


@pytest.mark.parametrize("label", IDS)
def test_another_process_reads_it_bit_for_bit(saved, label):
    folder, y, state = saved[label]
    answer = torch.load(folder / "with.pt")
    assert_same(answer, {"y": y, **state})


@pytest.mark.parametrize("label", IDS[::3])
def test_load_gives_the_class_that_was_saved_and_its_numbers(saved, label):
    folder, y, state = saved[label]
    name, batch = torch.load(folder / "question.pt")
    loaded = qtk.load(folder)
    assert type(loaded).__name__ == name and not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert_same(loaded.state_dict(), state)
    assert torch.equal(output(loaded, batch), y)


WITHOUT = [
    f"{name}-{scheme}-float32"
    for name in ("BertModel", "OPT350m", "ViTForImageClassification")
    for scheme in ("w8a8", "w4a4")
]


def test_without_qtk_nothing_loads_silently(saved):
    folders = [saved[label][0] for label in WITHOUT]
    read_elsewhere("without", folders)
    for folder in folders:
        answer = torch.load(folder / "without.pt")
        assert "AutoModel" in answer and len(answer) in (1, 2), answer.keys()
        assert all(isinstance(text, str) and "Error" in text for text in answer.values())


# --- classes


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "ViTForImageClassification"])
def test_a_head_can_be_taken_off(saved, name):
    folder, _, state = saved[f"{name}-w8a8-float32"]
    _, batch = torch.load(folder / "question.pt")
    base = transformers.AutoModel.from_pretrained(folder)
    qmodel, _ = quantized(name)
    prefix = qmodel.base_model_prefix
    for key, value in base.state_dict().items():
        if "pooler" not in key:
            assert torch.equal(value, state[f"{prefix}.{key}"]), key
    assert torch.equal(output(base, batch), output(qmodel.base_model, batch))


@pytest.mark.parametrize("base, head", [
    ("BertModel", "BertForSequenceClassification"), ("ViTModel", "ViTForImageClassification"),
    ("OPTModel", "OPTForCausalLM"),
])  # fmt: skip
def test_a_head_can_be_put_on(saved, base, head):
    folder, _, state = saved[f"{base}-w8a8-float32"]
    model = getattr(transformers, head).from_pretrained(folder)
    inner = model.base_model.state_dict()
    assert all(torch.equal(inner[k], v) for k, v in state.items() if "pooler" not in k)


def test_the_base_of_a_quantized_model_can_be_saved_alone(tmp_path):
    qmodel, batch = quantized("BertForSequenceClassification")
    qmodel.bert.save_pretrained(tmp_path)
    assert torch.equal(output(qtk.load(tmp_path), batch), output(qmodel.bert, batch))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name, bits, other", [
    ("BertForSequenceClassification", {"classifier": (8, 8)}, "BertModel"),
    ("ViTForImageClassification", {"classifier": (8, 8)}, "ViTModel"),
    ("BertModel", {"pooler*": (8, 8), "*word_embeddings": (4, 16)}, "BertForTokenClassification"),
    ("OPT350m", {"*project*": (4, 8)}, "OPTModel"),
])  # fmt: skip
def test_heads_and_embeddings_in_integers(tmp_path, name, bits, other, dtype):
    qmodel, batch = quantized(name, dtype=dtype, bits=bits)
    qmodel.save_pretrained(tmp_path)
    loaded = qtk.load(tmp_path)
    assert_same(loaded.state_dict(), qmodel.state_dict())
    assert torch.equal(output(loaded, batch), output(qmodel, batch))
    model = getattr(transformers, other).from_pretrained(tmp_path)
    inner, wanted = model.base_model.state_dict(), qmodel.base_model.state_dict()
    assert [
        k for k, v in inner.items() if "pooler" not in k and not torch.equal(v, wanted[k])
    ] == []


def test_quantized_embeddings_cannot_be_tied_to_a_head(tmp_path):
    quantized("BertModel", bits={"*word_embeddings": (8, 16)})[0].save_pretrained(tmp_path)
    with pytest.raises(qtk.CheckpointError, match="the class it was saved from"):
        transformers.BertForMaskedLM.from_pretrained(tmp_path)


# --- types


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["BertModel", "ViTForImageClassification"])
def test_scales_stay_float32_whatever_type_is_asked_for(saved, name, dtype):
    folder, _, state = saved[f"{name}-w8a8-float32"]
    model, batch = qtk.load(folder, dtype=dtype), build(name, dtype)[1]
    for key, layer in quantized_layers(model).items():
        assert all(torch.equal(b, state[f"{key}.{leaf}"]) for leaf, b in layer.named_buffers())
    kept = {id(b) for layer in quantized_layers(model).values() for b in layer.buffers()}
    rest = [t for t in [*model.parameters(), *model.buffers()] if id(t) not in kept]
    assert {t.dtype for t in rest if t.is_floating_point()} == {dtype}
    assert output(model, batch).dtype == dtype


@pytest.mark.parametrize("scheme", ["w8a8", "w4a4", "w4a16_g32"])
def test_scales_stay_float32_when_the_model_is_cast(scheme):
    qmodel, batch = quantized("OPTForCausalLM", scheme)
    before = {k: v.clone() for k, v in qmodel.state_dict().items()}
    y = output(qmodel, batch)
    for dtype in (torch.bfloat16, torch.float16):
        qmodel.to(dtype)
        for name, layer in quantized_layers(qmodel).items():
            assert all(torch.equal(b, before[f"{name}.{k}"]) for k, b in layer.named_buffers())
        assert (
            torch.nn.functional.cosine_similarity(output(qmodel, batch).float(), y, 2).min() > 0.9
        )


# --- copies


@pytest.mark.parametrize("scheme", ["w8a8", "w4a4", "w4a16_g32", "rotated"])
def test_copies_compute_the_same(scheme, tmp_path):
    qmodel, batch = quantized("BertForMaskedLM", scheme)
    y, state = output(qmodel, batch), qmodel.state_dict()
    torch.save(qmodel, tmp_path / "whole.pt")
    copies = [
        copy.deepcopy(qmodel),
        pickle.loads(pickle.dumps(qmodel)),
        torch.load(tmp_path / "whole.pt", weights_only=False),
    ]
    for i, other in enumerate(copies):
        assert_same(other.state_dict(), state)
        assert torch.equal(output(other, batch), y)
        assert other.save_pretrained.model is other
        assert [m.is_fused for m in other.bert.encoder.layer] == [
            m.is_fused for m in qmodel.bert.encoder.layer
        ]
        other.save_pretrained(tmp_path / str(i))
        assert torch.equal(output(qtk.load(tmp_path / str(i)), batch), y)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a4", "w4a16_g32"])
def test_a_state_dict_fills_another_model(scheme):
    first, batch = quantized("BertModel", scheme)
    model, _ = build("BertModel")
    other = {k: v * 1.1 for k, v in batch.items() if v.is_floating_point()} or {
        "input_ids": (batch["input_ids"] * 7) % 99
    }
    second = qtk.quantize(model, calib=[other], progress=False, **SCHEMES[scheme])
    second.load_state_dict(first.state_dict())
    assert_same(second.state_dict(), first.state_dict())
    assert torch.equal(output(second, batch), output(first, batch))


# --- saving


def test_shards(tmp_path):
    qmodel, batch = quantized("BertForMaskedLM")
    qmodel.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(output(qtk.load(tmp_path), batch), output(qmodel, batch))


def test_saving_again_replaces_the_weights_and_keeps_the_tokenizer(tmp_path):
    first, _ = quantized("BertModel", "w8a8")
    first.save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "more").mkdir()
    second, batch = quantized("BertModel", "w4a4")
    second.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "more", "tokenizer.json",
    ]  # fmt: skip
    assert torch.equal(output(qtk.load(tmp_path), batch), output(second, batch))


def test_a_crash_while_saving_leaves_what_was_there(tmp_path, monkeypatch):
    first, _ = quantized("BertModel", "w8a8")
    first.save_pretrained(tmp_path / "model")
    before = {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()}

    def crash(*args, **kwargs):
        raise OSError("no space left on device")

    second, _ = quantized("BertModel", "w4a4")
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", crash)
    for folder in ("model", "new"):
        with pytest.raises(OSError, match="no space"):
            second.save_pretrained(tmp_path / folder)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()} == before


def test_saving_into_the_current_folder_and_through_a_link(tmp_path, monkeypatch):
    qmodel, batch = quantized("BertModel")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path / "real")
    for folder in (".", tmp_path / "link"):
        qmodel.save_pretrained(folder)
        assert (tmp_path / "link").is_symlink()
        assert torch.equal(output(qtk.load("."), batch), output(qmodel, batch))


def test_others_may_read_what_is_saved(tmp_path):
    qmodel, _ = quantized("BertModel")
    (tmp_path / "plain").mkdir()
    qmodel.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved").stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "file").write_text("")
    modes = {path.stat().st_mode for path in (tmp_path / "saved").iterdir()}
    assert modes == {(tmp_path / "file").stat().st_mode}


def test_the_config_is_strict_json(tmp_path):
    qmodel, _ = quantized("BertModel")
    qmodel.save_pretrained(tmp_path)

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    config = json.loads((tmp_path / "config.json").read_text(), parse_constant=refuse)
    assert config["quantization_config"]["quant_method"] == "qtk"


def test_a_model_made_for_one_device_loads_on_another(tmp_path):
    qmodel, batch = quantized("BertModel", backend="cpu")
    qmodel.save_pretrained(tmp_path)
    edit_config(tmp_path, backend="triton")
    assert torch.equal(output(qtk.load(tmp_path), batch), output(qmodel, batch))


# --- what cannot be trusted


def edit_config(folder, **changes):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"].update(changes)
    file.write_text(json.dumps(config))


def edit_tensors(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def without(leaf):
    def change(tensors):
        del tensors[next(k for k in sorted(tensors) if k.endswith(leaf))]

    return change


def filled(leaf, value):
    def change(tensors):
        tensors[next(k for k in sorted(tensors) if k.endswith(leaf))].fill_(value)

    return change


def reshaped(leaf):
    def change(tensors):
        name = next(k for k in sorted(tensors) if k.endswith(leaf))
        tensors[name] = tensors[name][:-1].clone()

    return change


def extra(name):
    def change(tensors):
        tensors[name] = torch.ones(3)

    return change


BROKEN_TENSORS = [
    (without("weight_scale"), "weight_scale"),
    (without("query.weight"), "query.weight"),
    (without("input_zero_point"), "input_zero_point"),
    (without("key.bias"), "key.bias"),
    (filled("weight_scale", float("nan")), "weight_scale.*nan"),
    (filled("weight_scale", 0), "weight_scale.*zero"),
    (filled("input_scale", -1), "input_scale.*above zero"),
    (filled("input_channel_scale", 0), "input_channel_scale.*above zero"),
    (filled("input_shift", float("inf")), "input_shift.*inf"),
    (reshaped("weight_scale"), "weight_scale.*shape|does not fit"),
    (reshaped("query.weight"), "query.weight.*shape|does not fit"),
]


@pytest.fixture(params=["BertModel", "BertForMaskedLM"])
def folder(request, tmp_path):
    qmodel, _ = quantized(request.param)
    qmodel.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("reader", [qtk.load, transformers.AutoModel.from_pretrained])
@pytest.mark.parametrize("change, told", BROKEN_TENSORS, ids=[told for _, told in BROKEN_TENSORS])
def test_broken_tensors_are_refused(folder, change, told, reader):
    edit_tensors(folder, change)
    errors = qtk.CheckpointError if reader is qtk.load else (qtk.CheckpointError, RuntimeError)
    with pytest.raises(errors, match=f"(?s){told}|ignore_mismatched_sizes"):
        reader(folder)


@pytest.mark.parametrize("change, told", [
    (without("word_embeddings.weight"), "missing keys.*word_embeddings"),
    (without("output.LayerNorm.weight"), "missing keys.*LayerNorm"),
    (extra("encoder.layer.0.surprise"), "unexpected keys.*surprise"),
])  # fmt: skip
def test_load_wants_every_float_tensor_and_no_other(folder, change, told):
    edit_tensors(folder, change)
    with pytest.raises(qtk.CheckpointError, match=told):
        qtk.load(folder)


@pytest.mark.parametrize("damage, told", [
    (lambda f: (f / "config.json").unlink(), "no config.json"),
    (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    (lambda f: (f / "config.json").write_text("[]"), "not saved by qtk"),
    (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "not valid JSON"),
    (lambda f: (f / "model.safetensors").unlink(), "no .safetensors"),
    (lambda f: (f / "model.safetensors").write_bytes(b""), "truncated perhaps"),
    (lambda f: (f / "model.safetensors").write_bytes(
        (f / "model.safetensors").read_bytes()[:-100]), "truncated perhaps"),
    (lambda f: edit_config(f, version=99), "install a newer qtk"),
    (lambda f: edit_config(f, version="1"), "names no version"),
    (lambda f: edit_config(f, layers={}), "lists no layers"),
    (lambda f: edit_config(f, layers={"encoder.layer.0.attention.self.query": {}}), "no scheme"),
    (lambda f: edit_config(f, layers={"encoder.layer.0.attention.self.query": None}), "object"),
    (lambda f: edit_config(f, quant_method="other"), "not saved by qtk"),
])  # fmt: skip
def test_broken_files_are_refused(folder, damage, told):
    damage(folder)
    with pytest.raises(qtk.CheckpointError, match=told):
        qtk.load(folder)


@pytest.mark.parametrize("change, told", [
    ({"bits": 9}, "bits of w: choose 2 to 8"),
    ({"granularity": "group", "group_size": 0}, "group_size"),
    ({"granularity": "row"}, "granularity"),
    ({"symmetric": 1, "unknown": 1}, "unknown"),
])  # fmt: skip
def test_a_layer_that_cannot_be_is_refused(folder, change, told):
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    for layer in config["layers"].values():
        layer["scheme"]["w"].update(change)
    edit_config(folder, layers=config["layers"])
    with pytest.raises(qtk.CheckpointError, match=told):
        qtk.load(folder)


def test_a_layer_that_the_model_lacks_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    layers = {name.replace("query", "quest"): v for name, v in config["layers"].items()}
    edit_config(folder, layers=layers)
    with pytest.raises(qtk.CheckpointError, match="quest"):
        qtk.load(folder, verify=False)


def test_no_such_folder(tmp_path):
    with pytest.raises(qtk.CheckpointError, match="no such folder"):
        qtk.load(tmp_path / "nothing")
