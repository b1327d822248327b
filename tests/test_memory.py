"""What a quantized model takes in memory, on disk, and while it is loaded."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open

import qtk
from qtk.modules.fused.block import FusedBlock
from qtk.modules.linear import QuantLinear
from qtk_kernels.dispatch import cpu_has_int8

LOAD = """
import json, resource, sys
import torch, qtk, transformers.models.bert.modeling_bert
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
qtk.load(sys.argv[1])  # what any first load imports and sets up
before = peak()
held = [qtk.load(sys.argv[2]), peak() - before]
print(json.dumps(held[1]))
"""


def nbytes(tensor):
    return torch.ops.mkldnn._nbytes(tensor) if tensor.is_mkldnn else tensor.nbytes


def linears(qmodel):
    return {n: m for n, m in qmodel.named_modules() if isinstance(m, QuantLinear)}


@pytest.fixture(scope="module", params=[8, 4], ids=["W8A8", "W4A8"])
def saved(request, minilm_path, tmp_path_factory):
    from transformers import AutoModel

    folder = tmp_path_factory.mktemp("saved")
    model = AutoModel.from_pretrained(minilm_path)
    batch = {"input_ids": torch.randint(1000, 20000, (4, 16))}
    qmodel = qtk.quantize(model, request.param, 8, calib=[batch], preset="fast", progress=False)
    qmodel.save_pretrained(folder)
    return qmodel, folder, request.param


def test_linears_hold_a_third_of_float32_at_most(saved):
    qmodel, _, bits = saved
    if not cpu_has_int8(bits, 8):
        pytest.skip("other CPUs hold plain codes beside q's, k's and v's")
    blocks = [m for m in qmodel.modules() if isinstance(m, FusedBlock)]
    tensors = {id(t): t for block in blocks for t in block.tensors()}
    float32 = sum(4 * m.in_features * m.out_features for m in linears(qmodel).values())
    assert sum(map(nbytes, tensors.values())) <= 0.35 * float32


def test_the_file_is_as_small_as_the_bits(saved):
    qmodel, folder, bits = saved
    names, stored, float32 = linears(qmodel), 0, 0
    with safe_open(folder / "model.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118 - not a dict
            if key.rpartition(".")[0] in names:
                stored += file.get_tensor(key).nbytes
    float32 = sum(4 * m.in_features * m.out_features for m in names.values())
    assert stored <= {8: 0.30, 4: 0.20}[bits] * float32


def test_loading_needs_less_than_one_copy_in_float(saved, tmp_path):
    from tests.zoo import build

    qmodel, folder, _ = saved
    small, batch = build("BertModel")
    qtk.quantize(small, 8, 8, calib=[batch], progress=False).save_pretrained(tmp_path)
    command = [sys.executable, "-c", LOAD, str(tmp_path), str(folder)]
    more = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    float32 = sum(4 * m.in_features * m.out_features for m in linears(qmodel).values())
    float32 += sum(p.nbytes for p in qmodel.parameters())  # the embeddings, float in both
    assert more < float32 / 2**20
