"""Rotations merged offline keep the function, in float64 to 1e-10, and survive saving."""

import copy

import pytest
import torch

import qtk
from qtk.models import describe
from qtk.observe import walk
from qtk.scheme import Scheme
from qtk.transform import rotate
from qtk.transform._merge import keeping_ones, prepare
from tests import zoo

MERGED = {
    "OPTForCausalLM",
    "ViTForImageClassification",
    "DeiTForImageClassification",
    "DistilledDeiT",
}


def randomized(name):
    """A model in float64 whose norms and biases are all at work."""
    model, batch = zoo.build(name, torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_().add_(0.5)
    return model, {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


@pytest.mark.parametrize("name", zoo.ZOO)
def test_merged_rotation_keeps_the_function(name):
    model, batch = randomized(name)
    rotated = copy.deepcopy(model)
    blocks = prepare(rotated, describe(rotated))
    with torch.no_grad():
        wanted, got = model(**batch)[0], rotated(**batch)[0]
    assert (got - wanted).abs().max() <= 1e-10 * wanted.abs().max()
    assert {block.groups[0].rotated for block in blocks} == {name in MERGED}
    changed = any(
        not torch.equal(a, b) for a, b in zip(model.parameters(), rotated.parameters(), strict=True)
    )
    assert changed == (name in MERGED)


@pytest.mark.parametrize("name", zoo.ZOO)
def test_online_rotation_keeps_the_function(name):
    model, batch = randomized(name)
    for site in walk(model, describe(model), [batch]):
        change = rotate.find(site, Scheme.of(4, 4))
        x = site.rows.double()
        for linear in site.linears.values():
            bias = 0 if linear.bias is None else linear.bias
            wanted = x @ linear.weight.T + bias
            shift = change.shift.double()
            got = change.inputs(x) @ change.weight(linear.weight).T + bias + linear.weight @ shift
            assert change.rotation and (got - wanted).abs().max() <= 1e-10 * wanted.abs().max()


@pytest.mark.parametrize("width", [1, 2, 5, 12, 32, 36, 48, 384])
def test_the_rotation_of_a_stream_keeps_the_ones_and_is_flat_elsewhere(width):
    R = keeping_ones(width)
    ones = torch.ones(width, dtype=torch.float64)
    assert torch.allclose(R @ R.T, torch.eye(width, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(ones @ R, ones, atol=1e-12)
    if width in (32, 48, 384):
        assert R.abs().sort().values[1:, -2].max() < 2 / width**0.5


@pytest.mark.parametrize("name", sorted(MERGED))
def test_a_merged_model_saves_and_loads_bit_for_bit(name, tmp_path):
    model, batch = zoo.build(name)
    qmodel = qtk.quantize(model, 4, 4, calib=[batch], progress=False)
    qmodel.save_pretrained(tmp_path)
    loaded = qtk.load(tmp_path)
    with torch.no_grad():
        assert torch.equal(qmodel(**batch)[0], loaded(**batch)[0])
        assert (qmodel(**batch)[0] - model(**batch)[0]).abs().mean() < model(**batch)[0].std()
    if name == "OPTForCausalLM":
        assert model.config.tie_word_embeddings and not loaded.config.tie_word_embeddings


def test_norms_that_cannot_be_divided_by_stay():
    model, _ = zoo.build("OPTForCausalLM")
    with torch.no_grad():
        model.model.decoder.final_layer_norm.weight[3] = 0
    before = copy.deepcopy(model.state_dict())
    assert not any(block.groups[0].rotated for block in prepare(model, describe(model)))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
