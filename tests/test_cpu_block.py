"""The fused block on a CPU with int8 instructions: the same numbers, and less memory."""

import copy

import pytest
import torch

import qtk
from qtk.modules.fused.block import FusedBlock
from qtk.modules.linear import QuantLinear
from qtk_kernels import dispatch
from qtk_kernels.dispatch import cpu_has_int8
from qtk_kernels.int8_linear import prepare_int8
from qtk_kernels.onednn import onednn_linear
from tests.zoo import build

pytestmark = pytest.mark.skipif(not cpu_has_int8(7, 8), reason="needs integer products on a CPU")
WIDEST = 8 if cpu_has_int8() else 7  # bits of weights beside 8 of activations

CODES = (torch.int8, torch.uint8)

SCHEMES = {
    "W8A8": {},
    "W8A8 token": {"activations": "token"},
    "W7A8": {"w": 7},
    "W4A8": {"w": 4},
    "W4A4 rotated": {"w": 4, "a": 4, "rounding": "nearest"},
    "W4A4 rotated token": {"w": 4, "a": 4, "rounding": "nearest", "activations": "token"},
    "W8A8 plain token": {"method": "none", "activations": "token"},
}


def quantized(name, **options):
    model, batch = build(name)
    model.config.use_cache = False
    options = {"w": 8, "a": 8, **options}
    if not cpu_has_int8(options["w"], options["a"]):
        pytest.skip("needs a CPU that multiplies bytes")
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
            qmodel, _ = quantized(name, w=WIDEST, **options)
            x = torch.randn(1, 4, 32)
            before = x.clone()
            blocks(qmodel)[0].fused(x, None, None)
            assert torch.equal(x, before)


@torch.no_grad()
def test_the_epilogue_knows_every_activation():
    for activation in ("gelu", "gelu_new", "relu"):
        model, batch = build("BertModel", hidden_act=activation)
        qmodel = qtk.quantize(model, WIDEST, 8, calib=[batch], progress=False)
        x = torch.randn(2, 5, 32)
        for block in blocks(qmodel):
            y = block.forward_for(None)(x, None, None)
            assert (block.forward_for(torch.float32)(x, None, None) - y).norm() < 1e-2 * y.norm()


def held(qmodel):
    """Bytes of codes that the linears of the blocks hold."""
    tensors = {id(t): t for block in blocks(qmodel) for t in block.tensors() if t.dtype in CODES}
    return sum(t.numel() for t in tensors.values())


@pytest.mark.parametrize("w", [8, 7, 4])
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
    qmodel, batch = quantized("BertModel", w=WIDEST)
    seen = []
    handle = qmodel.encoder.layer[0].output.dense.register_forward_hook(lambda *a: seen.append(1))
    qmodel(**batch)
    handle.remove()
    qmodel(**batch)
    assert len(seen) == 1


@torch.no_grad()
def test_recorders_that_transformers_leaves_behind_are_no_listeners():
    qmodel, batch = quantized("BertModel", w=WIDEST)
    qmodel.set_attn_implementation("eager")
    y = qmodel(**batch)[0]
    hidden = qmodel(**batch, output_hidden_states=True)
    assert torch.equal(hidden[0], y) and len(hidden.hidden_states) == 3
    assert len(qmodel(**batch, output_attentions=True).attentions) == 2
    assert all(block.is_fused for block in blocks(qmodel))
    assert torch.equal(qmodel(**batch)[0], y)  # fused again: the unfused sums differ


@torch.no_grad()
def test_half_precision_takes_the_general_block():
    qmodel, batch = quantized("BertModel", w=WIDEST)
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
    y = qtk.quantize(model, WIDEST, 8, **scheme)(**batch)[0]
    monkeypatch.setenv("QTK_CPU_INT8", "0")
    portable = qtk.quantize(model, WIDEST, 8, **scheme)
    first = blocks(portable)[0]
    assert first.forward_for(torch.float32) is first.forward_for(None)
    assert {layer.kernel for layer in qtk.summary(portable).layers} == {
        "float32 chunks (no int8 instructions)"
    }
    assert (portable(**batch)[0] - y).norm() < 1e-4 * y.norm()


@pytest.mark.parametrize("w, a, exact", [(8, 8, False), (7, 8, True), (8, 7, True), (4, 4, True)])
def test_without_vnni_one_operand_of_seven_bits_is_multiplied_as_integers(monkeypatch, w, a, exact):
    monkeypatch.setattr(dispatch, "HAS_INT8", False)
    monkeypatch.setattr(dispatch, "EXACT_BITS", 15)
    model, batch = build("OPTModel")
    qmodel = qtk.quantize(model, w, a, calib=[batch], progress=False, rounding="nearest")
    kernels = {layer.kernel for layer in qtk.summary(qmodel).layers}
    assert len(kernels) == 1 and kernels.pop().startswith("onednn") == exact


@pytest.mark.parametrize("w_bits, a_bits", [(7, 8), (8, 7), (4, 8), (4, 4)])
@pytest.mark.parametrize("M, N, K", [(1, 1, 1), (3, 17, 33), (1, 384, 1536), (64, 96, 384)])
def test_sums_of_the_largest_codes_are_exact(w_bits, a_bits, M, N, K):
    """No sum of two products saturates in 16 bits; below 2**24 float32 holds the sums."""
    for code in (-(2 ** (w_bits - 1)), 2 ** (w_bits - 1) - 1):
        w = torch.full((N, K), code, dtype=torch.int8)
        x = torch.full((M, K), 2**a_bits - 1, dtype=torch.uint8)
        operand = prepare_int8(w, "cpu", w_bits=w_bits, a_bits=a_bits)
        assert operand.is_mkldnn
        y = onednn_linear(x, operand, torch.full((N, 1), 2.0**-6), None)
        assert torch.equal(y, (x.double() @ w.double().T * 2.0**-6).float())
