"""GPTQ against a slow textbook version, and what every learned rounder promises."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtk.discover import load
from qtk.numerics import expand_groups, quantize
from qtk.round import Problem, best_scale, to_nearest
from qtk.round._coordinates import BLOCK, descended
from qtk.round._least_squares import error, hessian_of, target
from qtk.round.gptq import compensated
from qtk.scheme import Format


def textbook(weight, scale, hessian, fmt):
    """Optimal brain quantization in GPTQ's order: the inverse is updated after every column."""
    order = hessian.diag().argsort(descending=True).tolist()
    inverse = torch.linalg.inv(hessian.double())
    w, codes = weight.double().clone(), torch.zeros_like(weight)
    for i in order:
        codes[:, i] = quantize(w[:, i], scale[:, i], 0, fmt)
        e = (w[:, i] - codes[:, i] * scale[:, i]) / inverse[i, i]
        w -= e[:, None] * inverse[i]
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return codes


@pytest.mark.parametrize("K, group", [(5, None), (24, None), (24, 7), (140, None), (140, 64)])
def test_gptq_is_the_textbook_algorithm(K, group):
    weight, inputs = torch.randn(6, K), torch.randn(300, K) @ torch.randn(K, K)
    inputs[:, K // 2] = 0  # a dead channel
    fmt = Format(4, True, "channel" if group is None else "group", group)
    hessian = hessian_of(inputs)
    scale = expand_groups(best_scale(weight, fmt), K, group).expand_as(weight)
    assert torch.equal(
        compensated(weight, scale, hessian, fmt), textbook(weight, scale, hessian, fmt)
    )


@settings(max_examples=40, deadline=None)
@given(
    N=st.integers(1, 6), K=st.integers(1, 40), T=st.integers(1, 60), bits=st.integers(2, 8),
    group=st.sampled_from([None, 1, 7, 16]), seed=st.integers(0, 10**6),
)  # fmt: skip
@pytest.mark.parametrize("name", ["gptq", "adaround", "flexround"])
def test_a_rounder_is_never_above_nearest_on_the_same_hessian(name, N, K, T, bits, group, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, K, generator=generator)
    inputs = torch.randn(T, K, generator=generator) * torch.rand(K, generator=generator)
    fmt = Format(bits, True, "channel" if group is None else "group", group)
    problem = Problem(weight, fmt, inputs, inputs @ weight.T)
    wanted, hessian = target(problem)

    def cost(rounded):
        codes, scale = rounded
        return error(codes * expand_groups(scale, K, group) - wanted, hessian)

    with pytest.MonkeyPatch.context() as patch:  # the promise holds after any number of steps
        patch.setattr(load("round", name), "STEPS", 8, raising=False)
        mine = cost(load("round", name).find(problem))
    plain = cost(to_nearest(wanted, fmt, hessian.diag()))
    assert (mine <= plain * (1 + 1e-4) + 1e-9).all()


def test_learned_roundings_beat_nearest_clearly_where_inputs_are_correlated():
    x = torch.randn(800, 8) @ torch.randn(8, 64) + 0.3 * torch.randn(800, 64)
    weight = torch.randn(32, 64)
    problem = Problem(weight, Format(4), x, x @ weight.T)
    wanted, hessian = target(problem)

    def cost(name):
        codes, scale = load("round", name).find(problem)
        return float(error(codes * scale - wanted, hessian).sum())

    plain = cost("nearest")
    assert cost("gptq") < 0.4 * plain
    assert cost("adaround") < 0.6 * plain
    assert cost("flexround") < 0.6 * plain


@pytest.mark.parametrize("K, group", [(5, None), (24, 7), (2 * BLOCK + 3, None)])
def test_coordinate_descent_ends_where_no_single_code_can_be_improved(K, group, monkeypatch):
    monkeypatch.setattr("qtk.round._coordinates.SWEEPS", 100)
    fmt = Format(4, True, "channel" if group is None else "group", group)
    weight, inputs = torch.randn(6, K), torch.randn(300, K) @ torch.randn(K, K)
    hessian = hessian_of(inputs)
    scale = expand_groups(best_scale(weight, fmt), K, group).expand_as(weight)
    start = quantize(weight, scale, 0, fmt)
    codes = descended(start, scale, weight, hessian, fmt)
    reached = error(codes * scale - weight, hessian)
    assert (reached < error(start * scale - weight, hessian)).any()
    assert codes.abs().max() <= fmt.qmax and torch.equal(codes, codes.round())
    for i in range(K):
        for step in (-1, 1):
            other = codes.clone()
            other[:, i] = (other[:, i] + step).clamp(fmt.qmin, fmt.qmax)
            assert (error(other * scale - weight, hessian) >= reached * (1 - 1e-5)).all()
