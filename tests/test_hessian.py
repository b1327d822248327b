"""Ranges found on gradients: bottom-elimination blockwise calibration."""

import pytest
import torch

from qtk.models import describe
from qtk.numerics import fake_quantize, fake_quantize_token, scale_and_zero_point
from qtk.observe import walk
from qtk.observe.gradients import block_gradients
from qtk.ranges import Question, hessian
from qtk.scheme import Format
from tests.zoo import build


def sites(name):
    model, batch = build(name)
    blocks = describe(model)
    gradients = block_gradients(model, blocks, [batch], seed=0)
    return model, list(walk(model, blocks, [batch], gradients=gradients)), gradients


@pytest.mark.parametrize("name", ["ViTForImageClassification", "BertModel", "OPTForCausalLM"])
def test_gradients_are_those_of_the_model(name):
    _, found, gradients = sites(name)
    for site in found:
        for linear in [site.block.name, *site.linears]:
            grad = gradients[linear][0]
            assert grad.dim() == 2 and torch.isfinite(grad).all()
            assert grad.square().mean() == pytest.approx(1, rel=1e-4)
    if name == "ViTForImageClassification":  # the head reads the first token only
        last = gradients[found[-1].block.name][0]
        assert (last[1:] == 0).all() and (last[0] > 0).any()


@pytest.mark.parametrize("name", ["ViTForImageClassification", "BertModel", "OPTForCausalLM"])
def test_an_error_is_carried_through_the_rest_of_the_block(name):
    """The probe's difference is that of a block whose linear's input really has the error."""
    _, found, _ = sites(name)
    for site in found[4:]:  # of the second block
        part, module = site.probe.parts[0], site.probe.module
        error = torch.randn_like(part.x) * 0.01
        got, gradient = site.probe.effect(0, torch.stack([error, 2 * error]), "block")
        assert got.shape == (2, len(gradient))
        handles = [
            linear.register_forward_pre_hook(
                lambda _, args, e=error: (args[0] + e.view_as(args[0]),)
            )
            for linear in site.linears.values()
        ]
        with torch.no_grad():
            moved = module(part.hidden, *part.args, **part.kwargs)
            for handle in handles:
                handle.remove()
            still = module(part.hidden, *part.args, **part.kwargs)
        moved, still = (y if isinstance(y, torch.Tensor) else y[0] for y in (moved, still))
        want = (moved - still)[part.mask].flatten()
        assert torch.allclose(got[0], want, atol=1e-5)


def test_the_bottom_is_eliminated_for_each_candidate_by_itself():
    d = torch.tensor([[4.0, -3, 2, -1], [40.0, -30, 20, -10]])
    assert hessian.eliminated(d, 0.5).tolist() == [[4, -3, 0, 0], [40, -30, 0, 0]]
    assert torch.equal(hessian.eliminated(d, 0.0), d)


class Plain:
    """A probe of a site that is all there is: errors themselves, all alike."""

    def __init__(self, x):
        self.inputs = [x[None]]

    def effect(self, index, errors, granularity):
        return errors.flatten(1), torch.ones(errors[0].numel())


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_a_range_lies_inside_the_data_and_beats_the_whole(bits):
    x = torch.randn(400, 16)
    x[0, 0] = 25.0
    fmt = Format(bits, symmetric=False)
    lo, hi = hessian.find(Question([x], fmt, torch.ones(16), Plain(x))).ends
    assert x.min() <= lo < hi <= x.max()

    def error(lo, hi):
        return float((fake_quantize(x, *scale_and_zero_point(lo, hi, fmt), fmt) - x).square().sum())

    assert error(lo, hi) <= error(x.min(), x.max())


@pytest.mark.parametrize("bits", [4, 6])
def test_a_clip_of_tokens_beats_the_whole_range(bits):
    x = torch.randn(400, 16)
    x[:, 0] *= 2  # each token's largest value mostly stands alone
    fmt = Format(bits, granularity="token")
    clip = hessian.find(Question([x], fmt, torch.ones(16), Plain(x)), bottom_ratio=0.0).clip

    def error(clip):
        return float((fake_quantize_token(x, bits, clip) - x).square().sum())

    assert 0.4 < clip <= 1 and (clip < 1 or bits == 6)
    assert error(clip) == min(error(c) for c in hessian.CLIPS)


def test_settings_change_what_is_found():
    _, found, _ = sites("BertModel")
    site = found[-1]
    batches = [x[mask] for x, mask in site.sequences]
    weight = site.weight()
    probe = site.probe.changed(lambda x: x, lambda w: w)
    question = Question(batches, Format(4, False, "tensor"), weight.square().sum(0), probe)
    ends = {
        tuple(map(float, hessian.find(question, bottom_ratio=r, granularity=g).ends))
        for r, g in ((0.1, "block"), (0.9, "block"), (0.1, "layer"))
    }
    assert len(ends) > 1
