"""Models that memory does not hold: from a folder to a folder, one block at a time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qtk
from qtk.models import describe
from tests.zoo import build

pytest.importorskip("accelerate")
ROOT = Path(__file__).resolve().parents[1]


def saved(folder, name="OPTForCausalLM", **changes):
    model, batch = build(name, **changes)
    model.save_pretrained(folder, max_shard_size="20KB")
    return model, batch


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("name, options", [
    ("OPTForCausalLM", {"w": 4, "a": 16, "group_size": 16}),
    ("OPT350m", {"w": 4, "a": 8, "rounding": "block", "skip": ["*.1.*fc1"]}),
    ("BertForSequenceClassification", {"w": 8, "a": 8, "bits": {"*word_embeddings": (8, 16)}}),
    ("BertModel", {"w": 4, "a": 8, "calib": None}),
    ("OPTModel", {"w": 8, "a": 8}),
])  # fmt: skip
def test_it_is_the_model_that_quantizing_in_memory_gives(tmp_path, name, options):
    model, batch = saved(tmp_path / "model", name)
    options = {"calib": [batch], "progress": False, **options}
    wanted = qtk.quantize(model, **options)
    qtk.quantize_files(tmp_path / "model", tmp_path / "out", **options)
    found = qtk.load(tmp_path / "out")
    assert_same(found.state_dict(), wanted.state_dict())
    with torch.no_grad():
        assert torch.equal(found(**batch)[0], wanted(**batch)[0])
    files = sorted(p.name for p in (tmp_path / "out").glob("model*"))
    assert len(files) == 4 and type(found).__name__ == type(model).__name__
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


def test_a_base_model_reads_the_files_of_one_with_a_head(tmp_path):
    _, batch = saved(tmp_path / "model", "BertForMaskedLM")
    config = tmp_path / "model" / "config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "architectures": ["BertModel"]})
    )
    with pytest.raises(qtk.ModelError, match=r"have no pooler"):
        qtk.quantize_files(tmp_path / "model", tmp_path / "out", calib=[batch], progress=False)


def test_it_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    _, batch = saved(tmp_path / "model")
    options = {"w": 4, "a": 16, "calib": [batch], "progress": False, "resume": tmp_path / "state"}
    quantize_site, sites = qtk.pipeline.quantize_site, []

    def counted(*args):
        sites.append(args[1].name)
        if len(sites) == 6:
            raise KeyboardInterrupt
        return quantize_site(*args)

    monkeypatch.setattr(qtk.pipeline, "quantize_site", counted)
    with pytest.raises(KeyboardInterrupt):
        qtk.quantize_files(tmp_path / "model", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    qtk.quantize_files(tmp_path / "model", tmp_path / "out", **options)
    assert len(sites) == 6 + 4
    qtk.quantize_files(tmp_path / "model", tmp_path / "whole", **{**options, "resume": None})
    for file in (tmp_path / "out").iterdir():
        assert file.read_bytes() == (tmp_path / "whole" / file.name).read_bytes()


@pytest.mark.parametrize("options, told", [
    ({"rounding": "tuned"}, "learn='model' looks at the whole model"),
    ({"bits": "auto"}, "bits='auto' looks at"),
    ({"ranges": "hessian"}, "ranges='hessian' looks at"),
    ({"method": "rotate"}, "method='rotate' looks at"),
    ({"inplace": True}, "no option inplace"),
])  # fmt: skip
def test_what_needs_the_whole_model_is_refused(tmp_path, options, told):
    _, batch = saved(tmp_path / "model")
    with pytest.raises(qtk.SchemeError, match=told):
        qtk.quantize_files(tmp_path / "model", tmp_path / "out", w=4, calib=[batch], **options)


LIMITED = """
import resource, sys
import torch, qtk, accelerate
from transformers import OPTForCausalLM
def held():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmData")) * 1024
folder, out, allowed, how = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
torch.set_num_threads(1)
calib = [{"input_ids": torch.arange(3, 35)[None]}]
torch.randn(64, 64) @ torch.randn(64, 64)
resource.setrlimit(resource.RLIMIT_DATA, (held() + allowed,) * 2)
options = {"w": 4, "a": 16, "calib": calib, "preset": "fast", "progress": False}
if how == "files":
    qtk.quantize_files(folder, out, **options)
else:
    qtk.quantize(folder, **options)
"""


def test_a_model_four_times_as_large_as_the_memory_allowed(tmp_path):
    sizes = {
        "hidden_size": 256,
        "word_embed_proj_dim": 256,
        "ffn_dim": 1024,
        "num_hidden_layers": 48,
    }
    model, _ = build("OPTForCausalLM", **sizes)
    model.save_pretrained(tmp_path / "model", max_shard_size="5MB")
    size = sum(p.stat().st_size for p in (tmp_path / "model").glob("*.safetensors"))
    del model

    def run(how):
        words = [
            sys.executable,
            "-c",
            LIMITED,
            tmp_path / "model",
            tmp_path / "out",
            size // 4,
            how,
        ]
        own = {  # what is freed goes back at once: the C library would keep some of it
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT}:{ROOT}/kernels",
            "MALLOC_MMAP_THRESHOLD_": "65536",
        }
        return subprocess.run(
            [*map(str, words)], env={**os.environ, **own}, capture_output=True, text=True
        )

    done = run("files")
    assert done.returncode == 0, done.stderr[-2000:]
    assert qtk.summary(tmp_path / "out").layers[0].scheme == "W4A16"
    assert run("memory").returncode != 0  # the limit is one


@pytest.mark.parametrize("name, options", [
    ("OPTForCausalLM", {"w": 4, "a": 8}),
    ("BertModel", {"w": 8, "a": 8, "attention": "int8"}),
])  # fmt: skip
def test_blocks_on_disk_come_at_each_call_and_compute_the_same(tmp_path, name, options):
    model, batch = build(name)
    qmodel = qtk.quantize(model, calib=[batch], progress=False, **options)
    qmodel.save_pretrained(tmp_path)
    blocks = [block.name for block in describe(model)]
    rest = {n: "cpu" for n, m in model.named_modules() if not list(m.children())}
    rest = {n: d for n, d in rest.items() if not n.startswith(tuple(blocks))}
    some = {**rest, blocks[0]: "cpu", blocks[1]: "disk"}
    small = {"cpu": sum(p.nbytes for p in qmodel.parameters()) + 9000}
    for loaded, left in (
        (qtk.load(tmp_path, device_map=some), blocks[1:]),
        (qtk.load(tmp_path, device_map="auto", max_memory=small), None),
        (qtk.load(tmp_path, device_map="auto"), []),
    ):
        on_disk = getattr(loaded, "qtk_on_disk", [])
        assert on_disk if left is None else on_disk == left
        for _ in range(2):
            with torch.no_grad():
                assert torch.equal(loaded(**batch)[0], qmodel(**batch)[0])
            for block in on_disk:
                assert all(t.is_meta for t in loaded.get_submodule(block).buffers())
    with pytest.raises(qtk.ModelError, match="only whole blocks"):
        qtk.load(tmp_path, device_map={"": "cpu", f"{blocks[0]}.nothing": "disk"})
