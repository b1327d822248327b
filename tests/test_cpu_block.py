"""The fused block on a CPU with int8 instructions: the same numbers, and less memory."""

import copy

import pytest
import torch

import qtk
from qtk.modules.fused.block import FusedBlock
from qtk.modules.linear import QuantLinear
from qtk_kernels.dispatch import cpu_has_int8
from tests.zoo import build

pytestmark = pytest.mark.skipif(not cpu_has_int8(), reason="needs a CPU that multiplies bytes")

CODES = (torch.int8, torch.uint8)

SCHEMES = {
    "W8A8": {},
    "W8A8 token": {"activations": "token"},
    "W4A8": {"w": 4},
    "W4A4 rotated": {"w": 4, "a": 4, "rounding": "nearest"},
    "W4A4 rotated token": {"w": 4, "a": 4, "rounding": "nearest", "activations": "token"},
    "W8A8 plain token": {"method": "none", "activations": "token"},
}


def quantized(name, **options):
    model, batch = build(name)
    model.config.use_cache = False
    options = {"w": 8, "a": 8, **options}
    return qtk.quantize(model, calib=[batch], progress=False, **options), batch


def blocks(qmodel):
    return [m for m in qmodel.modules() if isinstance(m, FusedBlock)]


@pytest.mark.parametrize("name", ["OPTModel", "OPT350m", "BertModel", "ViTModel"])
@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_it_computes_what_the_general_block_does(name, scheme):
    qmodel, _ = quantized(name, **SCHEMES[scheme])
    x = torch.randn(3, 5, qmodel.config.hidden_size)
    for block in blocks(qmodel):
        y = block.forward_for(None)(x, None, None)
        y_hat = block.forward_for(torch.float32)(x, None, None)
        if name.startswith("OPT"):
            assert torch.equal(y, y_hat)  # relu has nothing to round
        else:  # oneDNN's gelu is another polynomial: a code moves where it stood at a tie
            assert (y - y_hat).norm() < 1e-2 * y.norm()


@torch.no_grad()
def test_the_input_is_not_overwritten():
    for name in ("BertModel", "OPTModel"):
        for options in ({}, {"activations": "token", "method": "none"}):
            qmodel, _ = quantized(name, **options)
            x = torch.randn(1, 4, 32)
            before = x.clone()
            blocks(qmodel)[0].fused(x, None, None)
            assert torch.equal(x, before)


@torch.no_grad()
def test_the_epilogue_knows_every_activation():
    for activation in ("gelu", "gelu_new", "relu"):
        model, batch = build("BertModel", hidden_act=activation)
        qmodel = qtk.quantize(model, 8, 8, calib=[batch], progress=False)
        x = torch.randn(2, 5, 32)
        for block in blocks(qmodel):
            y = block.forward_for(None)(x, None, None)
            assert (block.forward_for(torch.float32)(x, None, None) - y).norm() < 1e-2 * y.norm()


def held(qmodel):
    """Bytes of codes that the linears of the blocks hold."""
    tensors = {id(t): t for block in blocks(qmodel) for t in block.tensors() if t.dtype in CODES}
    return sum(t.numel() for t in tensors.values())


@pytest.mark.parametrize("w", [8, 4])
@torch.no_grad()
def test_the_codes_of_q_k_and_v_are_held_once(w):
    qmodel, batch = quantized("BertModel", w=w)
    once = sum(m.in_features * m.out_features for m in qmodel.modules()
               if isinstance(m, QuantLinear))  # fmt: skip
    assert held(qmodel) == once
    state = {k: v.clone() for k, v in qmodel.state_dict().items()}
    y = qmodel(**batch)[0]
    for block in blocks(qmodel):  # called on its own, q needs its codes again
        block.get_submodule(block.block.anatomy.attention.q)(torch.randn(1, 32))
    assert held(qmodel) > once
    for other in (qmodel, copy.deepcopy(qmodel)):
        assert all(torch.equal(v, other.state_dict()[k]) for k, v in state.items())
        assert torch.equal(other(**batch)[0], y)


@torch.no_grad()
def test_a_hook_inside_is_still_called():
    qmodel, batch = quantized("BertModel")
    seen = []
    handle = qmodel.encoder.layer[0].output.dense.register_forward_hook(lambda *a: seen.append(1))
    qmodel(**batch)
    handle.remove()
    qmodel(**batch)
    assert len(seen) == 1


@torch.no_grad()
def test_recorders_that_transformers_leaves_behind_are_no_listeners():
    qmodel, batch = quantized("BertModel")
    qmodel.set_attn_implementation("eager")
    y = qmodel(**batch)[0]
    hidden = qmodel(**batch, output_hidden_states=True)
    assert torch.equal(hidden[0], y) and len(hidden.hidden_states) == 3
    assert len(qmodel(**batch, output_attentions=True).attentions) == 2
    assert all(block.is_fused for block in blocks(qmodel))
    assert torch.equal(qmodel(**batch)[0], y)  # fused again: the unfused sums differ


@torch.no_grad()
def test_half_precision_takes_the_general_block():
    qmodel, batch = quantized("BertModel")
    y = qmodel(**batch)[0]
    assert torch.nn.functional.cosine_similarity(
        qmodel.to(torch.bfloat16)(**batch)[0].float(), y, dim=-1
    ).min() > 0.999  # fmt: skip


@torch.no_grad()
def test_a_cpu_without_these_instructions_gives_the_same_answers_and_the_summary_says_so(
    monkeypatch,
):
    model, batch = build("OPTModel")  # relu: nothing but the products differs
    model.config.use_cache = False
    scheme = {"calib": [batch], "progress": False, "rounding": "nearest"}
    y = qtk.quantize(model, 8, 8, **scheme)(**batch)[0]
    monkeypatch.setenv("QTK_CPU_INT8", "0")
    portable = qtk.quantize(model, 8, 8, **scheme)
    first = blocks(portable)[0]
    assert first.forward_for(torch.float32) is first.forward_for(None)
    assert {layer.kernel for layer in qtk.summary(portable).layers} == {
        "float32 chunks (no int8 instructions)"
    }
    assert (portable(**batch)[0] - y).norm() < 1e-4 * y.norm()
