import math

import pytest
import torch

from qtk.numerics import (
    decibels,
    dequantize,
    expand_groups,
    fake_quantize,
    fake_quantize_token,
    in_groups,
    quantize,
    scale_and_zero_point,
)
from qtk.scheme import Format

FORMATS = [Format(bits, symmetric) for bits in (2, 4, 8) for symmetric in (True, False)]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_error_inside_the_range_is_at_most_half_a_step(fmt):
    x = torch.linspace(-3.0, 5.0, 1001)
    scale, zero_point = scale_and_zero_point(x.min(), x.max(), fmt)
    error = (fake_quantize(x, scale, zero_point, fmt) - x).abs()
    # an asymmetric grid's ends may be rounded away by half a step, as its zero point is whole
    limit = scale * (0.5 if fmt.symmetric else 1.0) * (1 + 1e-5)
    assert (error <= limit).all()


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_zero_is_exact(fmt):
    scale, zero_point = scale_and_zero_point(torch.tensor(-1.3), torch.tensor(2.9), fmt)
    assert fake_quantize(torch.zeros(1), scale, zero_point, fmt) == 0


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_codes_survive_dequantizing(fmt):
    scale, zero_point = scale_and_zero_point(torch.tensor(-2.0), torch.tensor(1.0), fmt)
    q = torch.arange(fmt.qmin, fmt.qmax + 1).float()
    assert torch.equal(quantize(dequantize(q, scale, zero_point), scale, zero_point, fmt), q)


def test_ties_go_to_even():
    q = quantize(torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5]), torch.tensor(1.0), 0, Format(8))
    assert q.tolist() == [0, 2, 2, 0, -2]


def test_a_constant_zero_tensor_does_not_divide_by_zero():
    scale, zero_point = scale_and_zero_point(torch.tensor(0.0), torch.tensor(0.0), Format(8, False))
    assert scale > 0 and torch.isfinite(zero_point)
    assert fake_quantize_token(torch.zeros(2, 4), 8).abs().sum() == 0


def test_every_token_has_its_own_scale():
    x = torch.tensor([[1.0, 0.5], [100.0, 50.0]])
    assert torch.allclose(fake_quantize_token(x, 8), x, rtol=1 / 127)


def test_clipping_a_token_saturates_its_largest_value():
    x = torch.tensor([[1.0, 0.25]])
    assert fake_quantize_token(x, 8, clip=0.5)[0, 0] == pytest.approx(0.5)


@pytest.mark.parametrize("K, size", [(7, 3), (8, 4), (5, 5), (5, 9), (1, 1)])
def test_groups_expand_to_what_they_were_cut_from(K, size):
    w = torch.randn(3, K)
    groups = in_groups(w, size)
    assert torch.equal(groups.flatten(1)[:, :K], w)
    maxima = groups.abs().amax(-1)
    assert (expand_groups(maxima, K, size) >= w.abs()).all()


def test_noise_of_a_tenth_is_twenty_decibels():
    x = torch.randn(1000)
    signal, noise = (float(y.square().sum()) for y in (x, 0.1 * x))
    assert decibels(signal, noise) == pytest.approx(20, abs=1e-3)
    assert decibels(signal, 0) == math.inf and decibels(0, noise) == -math.inf
    assert math.isnan(decibels(math.nan, noise))
