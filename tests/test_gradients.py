"""Gradients with respect to the input pass a quantized model as if nothing had been rounded."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

import qtk
from qtk.assembly import fused_blocks
from qtk.discover import available, load
from qtk.grids import Change, InputGrid, LinearSpec, Steps
from qtk.modules.linear import QuantLinear
from qtk.scheme import Scheme
from qtk.transform._rotation import keeping_ones

# CLIP's text encoder takes no embeddings, so that there is nothing to differentiate by; of
# convolutions tests/test_networks.py has one
LEFT_OUT = ("clip_text_model", "mobilenet_v1", "mobilenet_v2", "resnet")
FAMILIES = [name for name in available("models") if name not in LEFT_OUT]
SCHEMES = {
    "W8A8": {},
    "W8A8 token": {"activations": "token"},
    "W8A8 plain": {"method": "none"},
    "W8A8 rotated": {"method": "rotate"},
    "W8A16": {"a": 16},
    "W8A16 asymmetric": {"a": 16, "weights": "asymmetric"},
}


def inputs(model, batch):
    """The batch with a floating-point leaf in the place of ids or pixels, and that leaf."""
    if "pixel_values" in batch:
        leaf = batch["pixel_values"].clone().requires_grad_()
        return {**batch, "pixel_values": leaf}, leaf
    rest = {k: v for k, v in batch.items() if k != "input_ids"}
    leaf = model.get_input_embeddings()(batch["input_ids"]).detach().clone().requires_grad_()
    return {**rest, "inputs_embeds": leaf}, leaf


def gradient(model, batch):
    batch, leaf = inputs(model, batch)
    torch.manual_seed(1)
    y = model(**batch)[0]
    (y * torch.randn(y.shape)).sum().backward()
    return leaf.grad


def tiny(family):
    torch.manual_seed(0)
    model, batch = load("models", family).tiny()
    model.config.use_cache = False
    return model, batch


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_points_where_the_float_models_does(family, scheme):
    model, batch = tiny(family)
    qmodel = qtk.quantize(model, calib=[batch], progress=False, **SCHEMES[scheme])
    wanted, got = gradient(model, batch), gradient(qmodel, batch)
    if family == "opt" and scheme == "W8A8 rotated":  # its token table is rotated, offline
        got = got @ keeping_ones(got.shape[-1]).float().T
    assert torch.isfinite(got).all() and got.abs().max() > 0
    assert cosine_similarity(wanted.flatten(), got.flatten(), dim=0) > 0.9
    assert all(p.grad is None for p in qmodel.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_asking_for_gradients_does_not_change_the_output(family):
    model, batch = tiny(family)
    qmodel = qtk.quantize(model, calib=[batch], progress=False)
    batch, _ = inputs(model, batch)

    def hidden(net):  # of every token: a few logits hang on a single code at a tie
        return net(**batch, output_hidden_states=True).hidden_states[-1]

    y = hidden(qmodel)
    with torch.no_grad():
        fused, wanted = hidden(qmodel), hidden(model)
    assert y.requires_grad and not fused.requires_grad
    assert all(block.is_fused for block in fused_blocks(qmodel).values())
    # no further apart than two independent roundings of one model
    errors = (wanted - y).square().mean() + (wanted - fused).square().mean()
    assert (y - fused).square().mean() <= errors


def static_layer(scale, shift=None, channel_scale=None):
    scheme = Scheme.of(8, 8)
    torch.manual_seed(0)
    codes = torch.randint(-127, 128, (5, 4), dtype=torch.int8)
    change = Change(shift, channel_scale)
    grid = InputGrid(scheme.a, change, scale=torch.tensor(scale), zero_point=torch.tensor(3.0))
    steps = Steps(scheme.w, torch.rand(5, 1))
    return QuantLinear.from_spec(LinearSpec(codes, steps, grid, torch.zeros(5)))


@pytest.mark.parametrize("transformed", [False, True])
def test_the_gradient_is_that_of_the_dequantized_weight_and_zero_where_the_grid_clips(transformed):
    shift = torch.tensor([0.5, 0.0, -1.0, 0.0]) if transformed else None
    channel_scale = torch.tensor([1.0, 2.0, 1.0, 4.0]) if transformed else None
    layer = static_layer(0.1, shift, channel_scale)
    x = torch.tensor([[0.2, -0.3, 0.1, 0.0], [99.0, 0.1, -99.0, 0.2]], requires_grad=True)
    layer(x).sum().backward()
    weight = layer.spec().weight()  # of the transformed input
    wanted = (weight if channel_scale is None else weight / channel_scale).sum(0).repeat(2, 1)
    wanted[1, 0] = wanted[1, 2] = 0
    assert torch.allclose(x.grad, wanted, rtol=1e-5)


def test_a_dynamic_grid_lets_every_gradient_pass():
    scheme = Scheme.of(8, 8, "token")
    codes = torch.randint(-127, 128, (5, 4), dtype=torch.int8)
    spec = LinearSpec(codes, Steps(scheme.w, torch.rand(5, 1)), InputGrid(scheme.a), None)
    layer = QuantLinear.from_spec(spec)
    x = torch.tensor([[99.0, 0.1, -99.0, 0.2]], requires_grad=True)
    layer(x).sum().backward()
    assert torch.allclose(x.grad, layer.spec().weight().sum(0, keepdim=True), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gradient_has_its_inputs_type(dtype):
    layer = static_layer(0.1)
    x = torch.randn(2, 4, dtype=dtype, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype
