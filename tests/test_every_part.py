"""Every file in transform, ranges and round, found by being there."""

import ast
import importlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtk.discover import available, load
from qtk.errors import CalibrationError
from qtk.grids import Change
from qtk.models import describe
from qtk.modules.storage import pack_dense, unpack_dense
from qtk.numerics import expand_groups, fake_quantize, scale_and_zero_point
from qtk.observe import Site, imagine, walk
from qtk.ranges import Question, clip_tokens, rule_of
from qtk.round import Problem, rounder_of
from qtk.scheme import Format, Scheme


def outlier_sites(tokens=64):
    """Sites of a tiny BERT whose norms have a few large one-sided channels."""
    model, _ = load("models", "bert").tiny()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.weight[[3, 11]] *= 20
                module.bias[[3]] += 30
            if isinstance(module, torch.nn.Linear):
                module.weight *= 5
    ids = torch.randint(3, 99, (4, tokens // 4))
    return model, list(walk(model, describe(model), [{"input_ids": ids}]))


def error_of(site: Site, change: Change, bits=8) -> float:
    """Squared output error of the site's linears, min-max grids, after a transform."""
    x_new, w_new = change.inputs(site.rows), change.weight(site.weight())
    a, wf = Format(bits, symmetric=False), Format(bits)
    x_hat = fake_quantize(x_new, *scale_and_zero_point(x_new.min(), x_new.max(), a), a)
    scale, _ = scale_and_zero_point(w_new.amin(1, keepdim=True), w_new.amax(1, keepdim=True), wf)
    w_hat = fake_quantize(w_new, scale, 0, wf)
    return float((x_hat @ w_hat.T - x_new @ w_new.T).square().sum())


@pytest.mark.parametrize("name", available("transform"))
def test_a_transform_keeps_the_function(name):
    _, sites = outlier_sites()
    for site in sites:
        change = load("transform", name).find(site, Scheme.of(8, 8))
        x, w, b = site.rows.double(), site.weight().double(), site.bias().double()
        y = change.inputs(x) @ change.weight(w).T + change.bias(w, b)
        # the change's own numbers are float32: each product is right to a few units of 2 ** -24
        size = change.inputs(x).abs() @ change.weight(w).abs().T
        assert ((y - (x @ w.T + b)).abs() <= 4 * 2.0**-24 * (size + size.mean())).all()
        if change.shift is not None:
            assert change.shift.shape == change.channel_scale.shape == (w.shape[1],)
            assert (change.channel_scale > 0).all()


@pytest.mark.parametrize("name", available("transform"))
def test_a_transform_helps_where_there_are_outliers(name):
    _, sites = outlier_sites()
    norms = [s for s in sites if s.group.norm]
    plain = sum(error_of(s, Change()) for s in norms)
    changed = sum(error_of(s, load("transform", name).find(s, Scheme.of(8, 8))) for s in norms)
    assert changed < 0.7 * plain


def test_equalizing_lowers_the_product_of_input_and_weight_energies_almost_to_its_bound():
    _, sites = outlier_sites()
    for site in sites:
        change = load("transform", "rotate_equalized").find(site, Scheme.of(4, 4))
        x, w = site.rows - change.shift, site.weight()

        def product(scale, x=x, w=w):
            return float((x / scale).square().sum() * (w * scale).square().sum())

        bound = float((x.norm(dim=0) * w.norm(dim=0)).sum() ** 2)  # Cauchy-Schwarz
        plain = product(torch.ones_like(change.channel_scale))
        assert plain > bound
        assert product(change.channel_scale) < bound + 0.2 * (plain - bound)


def test_outlier_suppression_centres_and_only_ever_shrinks():
    _, sites = outlier_sites()
    for site in sites:
        change = load("transform", "outlier_suppression").find(site, Scheme.of(8, 8))
        shift, s = change.shift, change.channel_scale
        assert torch.allclose(shift, (site.hi.amax(0) + site.lo.amin(0)) / 2)
        assert (s >= 1).all()
        reach = (site.hi.amax(0) - site.lo.amin(0)) / 2
        treated = s > 1
        if treated.any():  # exactly the channels above one threshold are brought down to it
            threshold = (reach[treated] / s[treated]).mean()
            assert torch.allclose(reach[treated] / s[treated], threshold.expand(treated.sum()))
            assert (reach[~treated] <= threshold * (1 + 1e-5)).all()


def test_without_data_the_norm_gives_the_shift():
    model, _ = load("models", "bert").tiny()
    with torch.no_grad():
        model.embeddings.LayerNorm.bias[5] = 7.0
    site = next(iter(imagine(model, describe(model))))
    shift = load("transform", "outlier_suppression").find(site, Scheme.of(8, 8, "token")).shift
    assert abs(float(shift[5]) - 7) < 1 and shift.abs().median() < 1


WITHOUT_PROBE = [name for name in available("ranges") if not rule_of(name).needs_probe]


@pytest.mark.parametrize("name", WITHOUT_PROBE)  # the others: tests/test_hessian.py
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_a_range_lies_inside_the_data(name, bits):
    batches = [torch.randn(50, 16) + 0.3 for _ in range(3)]
    batches[0][0, 0] = 25.0
    fmt = Format(bits, symmetric=False, granularity="tensor")
    lo, hi = rule_of(name).find(Question(batches, fmt, torch.ones(16))).ends
    x = torch.cat(batches)
    assert x.min() * 1.06 - 1e-6 <= lo < hi <= x.max() * 1.06 + 1e-6
    scale, zero_point = scale_and_zero_point(lo, hi, fmt)
    assert scale > 0 and fmt.qmin <= zero_point <= fmt.qmax


@pytest.mark.parametrize("name", sorted({*WITHOUT_PROBE} & {*clip_tokens()}))
@pytest.mark.parametrize("bits", [4, 8])
def test_a_clip_of_tokens_is_a_share_of_their_maximum(name, bits):
    batches = [torch.randn(50, 16) for _ in range(3)]
    batches[0][0] = 0  # a token of zeros
    fmt = Format(bits, granularity="token")
    clip = rule_of(name).find(Question(batches, fmt, torch.ones(16))).clip
    assert 0 < clip <= 1 and (clip == 1) <= (name == "minmax" or bits == 8)


def test_a_percentile_of_tokens_is_the_quantile_of_each_over_its_maximum():
    x = torch.tensor([[4.0, -3, 2, 1], [0, 0, 0, -8]])
    question = Question([x], Format(8, granularity="token"), torch.ones(4))
    # places 2.4 of 0, 1, 2, 3 in order of size: 3.4 of 4, and 3.2 of 8
    assert load("ranges", "percentile").find(question, kept=0.8).clip == pytest.approx(
        (3.4 / 4 + 3.2 / 8) / 2
    )


def test_searched_ranges_beat_the_whole_range_at_four_bits():
    batches = [torch.randn(400, 32)]
    batches[0][0, 0] = 40.0
    fmt = Format(4, symmetric=False, granularity="tensor")

    def error(name: str) -> float:
        lo, hi = load("ranges", name).find(Question(batches, fmt, torch.ones(32))).ends
        x = batches[0]
        return float((fake_quantize(x, *scale_and_zero_point(lo, hi, fmt), fmt) - x).square().sum())

    whole = error("minmax")
    for name in ("mse", "weighted_mse"):
        assert error(name) < 0.7 * whole


def test_importance_moves_the_range():
    x = torch.randn(400, 2)
    x[:, 1] *= 30
    fmt, find = Format(4, False, "tensor"), load("ranges", "weighted_mse").find
    small = find(Question([x], fmt, torch.tensor([1.0, 0.0])))
    large = find(Question([x], fmt, torch.tensor([0.0, 1.0])))
    assert small.hi < 0.5 * large.hi


TURNED = ("flipped",)  # away from the nearest code, on purpose


@pytest.mark.parametrize("name", available("round"))
@pytest.mark.parametrize("bits, group", [(8, None), (4, None), (4, 16), (3, 5), (2, None)])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("data", [True, False], ids=["data", "no data"])
def test_a_rounder_stays_on_its_grid_and_is_no_worse_than_plain_rounding(
    name, bits, group, data, symmetric
):
    weight, inputs = torch.randn(24, 40), torch.randn(200, 40) * torch.rand(40).exp()
    inputs[:, 7] = 0  # a dead channel
    fmt = Format(bits, symmetric, "channel" if group is None else "group", group)
    wanted = inputs @ weight.T
    problem = Problem(weight, fmt, *((inputs, wanted) if data else (None, None)))
    if rounder_of(name).needs_calib and not data:
        with pytest.raises(CalibrationError, match="pass calib="):
            rounder_of(name).find(problem)
        return
    codes, steps = rounder_of(name).find(problem)
    groups = 1 if group is None else -(-40 // group)
    assert codes.shape == weight.shape and steps.scale.shape == (24, groups)
    assert torch.equal(codes, codes.round()) and (steps.scale != 0).all()
    assert codes.min() >= fmt.qmin and codes.max() <= fmt.qmax
    assert (steps.zero_point is None) == symmetric
    got = inputs @ steps.dequantize(codes).T
    plain = codes_of_absmax(weight, fmt)
    # the other neighbour of every weight costs (1 - e)^2 for e^2: 7 times as much on average
    bound = 7 if name in TURNED else 1.0001
    assert (got - wanted).square().sum() <= (inputs @ plain.T - wanted).square().sum() * bound


def codes_of_absmax(weight, fmt):
    from qtk.numerics import in_groups

    groups = in_groups(weight, fmt.group_size)
    scale = expand_groups(groups.abs().amax(-1) / fmt.qmax, weight.shape[1], fmt.group_size)
    return (weight / scale).round() * scale


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(2, 8), N=st.integers(1, 5), K=st.integers(1, 300), seed=st.integers(0, 99))
def test_unpacking_inverts_packing(bits, N, K, seed):
    generator = torch.Generator().manual_seed(seed)
    half = 2 ** (bits - 1)
    q = torch.randint(-half, half, (N, K), generator=generator).to(torch.int8)
    packed = pack_dense(q, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (N, -(-K * bits // 8))
    assert torch.equal(unpack_dense(packed, bits, K), q)


def test_no_function_of_a_package_is_hidden_by_a_file_of_its_name():
    """Importing qtk.round.nearest puts the module where a function `nearest` was."""
    for stage in ("transform", "ranges", "round"):
        package = importlib.import_module(f"qtk.{stage}")
        source = ast.parse(Path(package.__file__).read_text())
        defined = {node.name for node in source.body if hasattr(node, "name")}
        assert not defined & set(available(stage)), stage
