"""Bits under a budget: the integer program, the estimator, the budgets and the whole search."""

import itertools
import json
import math
import re
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import qtk
from qtk.assembly import quantized_layers
from qtk.errors import CalibrationError, CheckpointError, SchemeError
from qtk.mixed_precision import latency, search, sensitivity, space, verify
from qtk.mixed_precision.allocate import allocate, total
from qtk.mixed_precision.auto import share_of
from qtk.mixed_precision.budget import read
from qtk.mixed_precision.loss import Judge, bound
from qtk.mixed_precision.space import FLOATS, SCHEMES, W8A8, Space, default_schemes
from qtk.models import bert, describe, vit
from tests import zoo

INTEGERS = [(8, 8), (5, 8), (4, 4)]
QUICK = ((8, 8), (5, 8), (16, 16))  # four bits are padded to 128 codes: more than a tiny row
ROOT = Path(__file__).resolve().parents[1]
FAST = {"batch_size": 2, "progress": False, "preset": "fast"}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Timings that are good for nothing but quick."""
    monkeypatch.setattr(space, "SCHEMES", QUICK)
    monkeypatch.setattr(latency, "ROUNDS", 2)
    monkeypatch.setattr(verify, "ROUNDS", 2)
    monkeypatch.setattr(sensitivity, "RANDOM", 12)


def sentences(rows=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 99, (rows, 8), generator=generator)
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]


def encoder():
    torch.manual_seed(0)
    return bert.tiny()[0]


def classifier():
    model, _ = zoo.build("ViTForImageClassification")
    torch.nn.init.normal_(model.classifier.weight, std=2.0)  # so that answers differ
    return model, [{"pixel_values": torch.randn(40, 3, 16, 16)}]


def space_of(model, schemes=(*INTEGERS, (16, 16)), **options):
    options = search._options({"preset": "fast", **options}, 0)
    return Space.of(model, describe(model), schemes, [{}], options)


def brute_force(objective, limits):
    U, S = objective.shape
    feasible = [
        chosen for chosen in itertools.product(range(S), repeat=U)
        if all(total(cost, chosen) <= limit * (1 + 1e-9) for cost, limit in limits)
    ]  # fmt: skip
    return min(feasible, key=lambda chosen: total(objective, chosen), default=None)


def greedy(loss, cost, limit):
    """From the cheapest on, the step that saves most loss for its cost, while one fits."""
    chosen = list(cost.argmin(1))
    while True:
        steps = [
            ((loss[u, s] - loss[u, chosen[u]]) / extra, u, s)
            for u, s in np.ndindex(*loss.shape)
            if (extra := cost[u, s] - cost[u, chosen[u]]) > 0 and loss[u, s] < loss[u, chosen[u]]
            and total(cost, tuple(chosen)) + extra <= limit
        ]  # fmt: skip
        if not steps:
            return tuple(chosen)
        _, u, s = min(steps)
        chosen[u] = s


@pytest.mark.parametrize("units, schemes", [(1, 4), (3, 5), (6, 4), (8, 3), (10, 2)])
@pytest.mark.parametrize("seed", range(6))
def test_the_program_is_as_good_as_trying_everything(units, schemes, seed):
    rng = np.random.default_rng(seed)
    objective, *costs = (rng.lognormal(size=(units, schemes)) for _ in range(3))
    limits = [(cost, rng.uniform(0.8, 1.4) * cost.mean(1).sum()) for cost in costs][: 1 + seed % 2]
    wanted, found = brute_force(objective, limits), allocate(objective, limits)
    assert (found is None) == (wanted is None)
    if wanted is not None:
        assert found == wanted


@pytest.mark.parametrize("seed", range(6))
def test_greedy_is_never_better_and_stays_near_with_two_schemes(seed):
    rng = np.random.default_rng(seed)
    cost = np.stack([rng.uniform(1, 2, 24), rng.uniform(2, 4, 24)], 1)
    loss = np.stack([rng.lognormal(size=24), np.zeros(24)], 1)
    limit = float(cost.mean(1).sum())
    found = total(loss, allocate(loss, [(cost, limit)]))
    rule = total(loss, greedy(loss, cost, limit))
    # a knapsack: what greedy leaves is at most the one step that did not fit any more
    assert found <= rule + 1e-12
    assert rule <= found + loss.max()


def test_a_limit_that_is_met_exactly_is_kept():
    cost = np.array([[1.0, 2.0], [1.0, 2.0]]) * 1e6
    loss = np.array([[1.0, 0.0], [3.0, 0.0]])
    assert allocate(loss, [(cost, 3e6)]) == (0, 1)
    assert allocate(loss, [(cost, 2e6)]) == (0, 0)
    assert allocate(loss, [(cost, 1.9e6)]) is None


@pytest.mark.parametrize("text, metric, limit, of", [
    ("0.8x latency", "latency", 0.8, "w8a8"), (".5x bytes of float", "bytes", 0.5, "float"),
    ("1 x Bytes of W8A8", "bytes", 1, "w8a8"), ("12 ms", "latency", 0.012, None),
    ("250us latency", "latency", 250e-6, None), ("6 MB", "bytes", 6e6, None),
    ("cosine 0.99", "cosine", 0.01, None), ("kl 0.02", "kl", 0.02, None),
    ("drop 0.5 %", "drop", 0.005, None), ("drop 1 point", "drop", 0.01, None),
])  # fmt: skip
def test_budgets_are_read(text, metric, limit, of):
    (found,) = read(text)
    assert (found.metric, found.of) == (metric, of)
    assert math.isclose(found.limit, limit)


def test_several_budgets_are_joined():
    assert [b.metric for b in read("0.8x latency, cosine 0.98")] == ["latency", "cosine"]
    assert read(["0.8x latency", "cosine 0.98"]) == read("0.8x latency, cosine 0.98")


@pytest.mark.parametrize("text", [
    "", "fast", "0.8 latency", "0.8x speed", "cosine", "cosine 1.2", "cosine 1", "drop 0.5",
    "kl 0.1 %", "0x bytes", "-1 ms", "1 ms, 2 ms", 0.5, [], ["1 ms", 3],
])  # fmt: skip
def test_unreadable_budgets_are_refused(text):
    with pytest.raises(SchemeError, match="budget"):
        qtk.search(encoder(), text, sentences(), progress=False)


def test_an_infeasible_budget_states_the_range_and_its_ends_are_feasible():
    model = encoder()
    with pytest.raises(SchemeError, match=r"feasible are") as error:
        qtk.search(model, "0.01x bytes", sentences(), **FAST)
    ends = re.findall(r"([\d.]+)x", str(error.value))
    low = float(ends[-2])
    found = qtk.search(model, f"{1.01 * low}x bytes", sentences(), verify=False, **FAST)
    assert found.point.bytes == found.space.bytes().min(1).sum()


@pytest.mark.parametrize("budget, message", [
    ("0.7x bytes, 0.0000001 ms", "cannot be kept"), ("kl 0.1", "give cosine"),
    ("drop 5 %", "samples"), ("cosine 0.99, kl 0.1", "one of the two"),
])  # fmt: skip
def test_budgets_that_do_not_fit_the_model_are_refused(budget, message):
    with pytest.raises((SchemeError, CalibrationError), match=message):
        qtk.search(encoder(), budget, sentences(), **FAST)


def test_an_accuracy_budget_needs_data():
    with pytest.raises(SchemeError, match="give calib"):
        qtk.search(encoder(), "cosine 0.99", **FAST)


def test_losses_are_those_of_the_definition():
    model, batches = classifier()
    judge = Judge.of(model, batches)
    other, _ = zoo.build("ViTForImageClassification", num_labels=5)
    got = judge.losses(other)
    with torch.no_grad():
        p = model(**batches[0]).logits.double().softmax(-1)
        q = other(**batches[0]).logits.double().softmax(-1)
    torch.testing.assert_close(got, (p * (p / q).log()).sum(-1))
    drop = p.amax(-1) - p[torch.arange(len(p)), q.argmax(-1)]
    torch.testing.assert_close(judge.losses(other, "drop"), drop)
    # the same model, another batch split: rounding of float32 logits alone
    assert float(judge.losses(model).abs().max()) < 1e-6


def test_a_bound_holds_in_nearly_all_draws():
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(2000, 100, generator=generator, dtype=torch.float64).square()  # mean 1/3
    missed = sum(bound(draw, "cosine") < 1 / 3 for draw in draws) / len(draws)
    # 1 %, and what the skew of a square and two thousand draws may add to it
    assert missed < 0.03
    assert bound(torch.zeros(100), "drop") > 0.01  # no change in 100 samples is not no change


def test_least_squares_finds_effects_that_add_up():
    searched = space_of(encoder())
    rng = np.random.default_rng(0)
    effects = rng.lognormal(sigma=2, size=searched.shape)
    effects[:, searched.schemes.index(FLOATS)] = 0
    masks = [*sensitivity.singles(searched), *sensitivity.random_masks(searched, 40, 0)]
    losses = [sum(effects[u, s] for u, s in enumerate(m) if s != sensitivity.ALONE) for m in masks]
    found, errors = sensitivity.fit(searched, masks, np.array(losses))
    np.testing.assert_allclose(found, effects, rtol=1e-6)
    assert errors.max() < 1e-6
    noise = 1 + 0.1 * rng.standard_normal(len(losses))
    found, errors = sensitivity.fit(searched, masks, np.array(losses) * noise)
    lossy = effects > 0
    within = np.abs(found - effects)[lossy] < 3 * errors[lossy]
    assert within.mean() > 0.9  # standard errors say how far off an effect is


def test_masks_quantize_what_they_say_and_leave_the_model_as_it_was():
    model, batches = encoder(), sentences()
    searched, judge = space_of(model), Judge.of(model, batches)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    found = sensitivity.measure(
        model, describe(model), batches, judge, searched, seed=0, backend="auto", randoms=12
    )
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    effects = found.effects
    assert (effects[:, searched.schemes.index(FLOATS)] == 0).all()
    sums = effects.sum(0)
    assert sums[0] < sums[1] < sums[2]  # W8A8, W5A8, W4A4
    assert (effects[:, 2] > 0).all() and len(found.interactions) == 10


@pytest.mark.parametrize("family", ["BertModel", "OPTForCausalLM", "ViTForImageClassification"])
def test_blocks_before_a_mask_are_computed_once(family, monkeypatch):
    """Bit for bit what whole passes give, in fewer calls of the first block."""
    model, batch = zoo.build(family)
    batches, blocks, calls = [dict(batch), dict(batch)], describe(model), []
    searched, judge = space_of(model), Judge.of(model, batches)
    kind = type(model.get_submodule(blocks[0].name))
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))

    def effects():
        calls.clear()
        return sensitivity.measure(
            model, blocks, batches, judge, searched, seed=0, backend="auto", randoms=5
        ).effects, len(calls)  # fmt: skip

    found, few = effects()
    monkeypatch.setattr(sensitivity._Before, "known", lambda *_: nullcontext({}))
    whole, all_of_them = effects()
    np.testing.assert_array_equal(found, whole)
    singles = len(sensitivity.singles(searched))  # half of them in the second of two blocks
    assert all_of_them - few >= 2 * (singles // 2 - 1)


def test_a_search_that_was_interrupted_goes_on(tmp_path, monkeypatch):
    path, model = tmp_path / "losses", encoder()
    whole = qtk.search(model, "0.8x bytes", sentences(), verify=False, **FAST)
    calls, losses = [], Judge.losses

    def failing(self, *args):
        calls.append(1)
        if len(calls) == 21:
            raise KeyboardInterrupt
        return losses(self, *args)

    monkeypatch.setattr(Judge, "losses", failing)
    with pytest.raises(KeyboardInterrupt):
        qtk.search(model, "0.8x bytes", sentences(), verify=False, resume=path, **FAST)
    first = len(calls)
    again = qtk.search(model, "0.8x bytes", sentences(), verify=False, resume=path, **FAST)
    rest = len(calls) - first
    np.testing.assert_array_equal(again.sensitivity.effects, whole.sensitivity.effects)
    qtk.search(model, "0.8x bytes", sentences(), verify=False, resume=path, **FAST)
    of = Judge.of

    def noisy(*args):
        judge = of(*args)
        return replace(judge, answers=tuple(1.0001 * answer for answer in judge.answers))

    monkeypatch.setattr(Judge, "of", noisy)  # as a library answers that adds in another order
    qtk.search(model, "0.8x bytes", sentences(), verify=False, resume=path, **FAST)
    assert len(calls) == first + rest  # nothing is measured twice
    with pytest.raises(CheckpointError, match="another model"):
        qtk.search(model, "0.8x bytes", sentences(seed=1), verify=False, resume=path, **FAST)


def test_another_process_goes_on_with_a_search(tmp_path, monkeypatch):
    """Which has its functions at other addresses."""
    code = (
        "import sys, qtk; from qtk.mixed_precision import sensitivity; "
        "from tests.test_mixed_precision import FAST, QUICK, encoder, sentences; "
        "sensitivity.RANDOM = 12; qtk.search(encoder(), '0.8x bytes', sentences(), schemes=QUICK, "
        "verify=False, resume=sys.argv[1], **FAST)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "losses")], check=True, cwd=ROOT)

    def never(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(Judge, "losses", never)
    qtk.search(encoder(), "0.8x bytes", sentences(), verify=False, resume=tmp_path / "losses",
               **FAST)  # fmt: skip


def test_operations_are_timed_once_and_kept(tmp_path, monkeypatch):
    path, model = tmp_path / "times.json", encoder()
    found = qtk.bench_ops(model, sentences(), latencies=path, **FAST)
    assert len(set(found.operations)) == 4 and found.seconds.shape == (8, 3)
    assert (found.seconds > 0).all()
    for kernel, pair in zip(found.kernels[0], found.schemes, strict=True):
        assert ("torch linear" in kernel) == (pair == FLOATS)

    def never(*_, **__):
        raise AssertionError("timed again")

    monkeypatch.setattr(latency, "_runs", lambda *a: latency._Runs(never, "", ""))
    monkeypatch.setattr(latency, "race", lambda calls, *a, **k: dict.fromkeys(calls, 1.0))
    again = qtk.bench_ops(model, sentences(), latencies=path, **FAST)
    np.testing.assert_array_equal(again.seconds, found.seconds)
    (table,) = json.loads(path.read_text())
    path.write_text(json.dumps([{**table, "device": {"cpu": "another"}}]))
    other = qtk.bench_ops(model, sentences(), latencies=path, **FAST)
    assert (other.seconds == 1).all()  # another device's times are not this one's
    assert len(json.loads(path.read_text())) == 2
    path.write_text("[1]")
    with pytest.raises(CheckpointError, match="no table of operations"):
        qtk.bench_ops(model, sentences(), latencies=path, **FAST)


def test_what_runs_the_same_takes_the_same_and_the_verdict_says_so():
    schemes = {**FAST, "schemes": [(8, 8), (6, 8), (5, 8)], "backend": "reference"}
    found = qtk.bench_ops(encoder(), sentences(), **schemes)
    assert (found.seconds[:, 0] == found.seconds[:, 1]).all()
    assert found.faster == () and "no scheme of fewer bits is faster" in found.table()


def test_the_prediction_of_the_float_model_is_what_was_measured():
    found = qtk.search(encoder(), "1x latency of float", sentences(), verify=False, **FAST)
    floats = next(p for p in found.references if p.name == "float")
    times = found.latencies
    if times.rest:  # zero where the operations alone take longer than the whole did
        assert math.isclose(floats.seconds, times.float_seconds)


def test_a_bytes_budget_is_used_and_kept():
    model = encoder()
    found = qtk.search(model, "0.8x bytes", sentences(), verify=2, **FAST)
    w8a8 = next(p for p in found.references if p.name == "W8A8")
    assert found.point.bytes <= 0.8 * w8a8.bytes
    qmodel = qtk.quantize(model, calib=found.calib, bits=found.bits, preset="fast", progress=False)
    assert qtk.summary(qmodel).bytes == found.point.bytes
    floats = {name for name, pair in found.bits.items() if pair == FLOATS}
    assert set(quantized_layers(qmodel)) == set(found.bits) - floats
    assert [p.name for p in found.checked[-2:]] in (["W5A8", "found"], ["mixture", "found"])
    assert all(p.measured is not None for p in found.checked) and len(found.checked) == 4
    assert found.point.measured.loss <= found.checked[-2].measured.loss
    losses = [p.loss for p in found.pareto]
    assert losses == sorted(losses, reverse=True)
    by_bytes = allocate(found.sensitivity.effects, [(found.space.bytes(), 0.8 * w8a8.bytes)])
    mixture = min(found.checked[-2:], key=lambda p: p.loss)
    assert mixture.loss <= found.sensitivity.predict(by_bytes) * (1 + 1e-9)


def test_q_k_and_v_share_a_scheme():
    found = qtk.search(encoder(), "0.8x bytes", sentences(), verify=False, **FAST)
    for i in range(2):
        names = [f"encoder.layer.{i}.attention.self.{n}" for n in ("query", "key", "value")]
        assert len({found.bits[name] for name in names}) == 1


def test_an_accuracy_budget_is_kept_on_data_that_the_search_did_not_see():
    model = encoder()
    found = qtk.search(model, "cosine 0.9999", sentences(40), **FAST)
    measured = found.point.measured
    assert measured is not None and measured.bound <= 1e-4 and measured.loss < measured.bound
    qmodel = qtk.quantize(model, calib=found.calib, bits=found.bits, preset="fast", progress=False)
    fresh = Judge.of(model, sentences(64, seed=7))
    assert float(fresh.losses(qmodel).mean()) <= 1e-4
    strict = qtk.search(model, "cosine 0.99999", sentences(40), **FAST)
    assert strict.point.bytes >= found.point.bytes


@pytest.mark.slow
def test_an_accuracy_budget_holds_in_nineteen_of_twenty_draws():
    model, kept = encoder(), 0
    for seed in range(20):
        calib = sentences(60, seed=seed)
        found = qtk.search(model, "cosine 0.9998", calib, **{**FAST, "schemes": INTEGERS})
        qmodel = qtk.quantize(
            model, calib=found.calib, bits=found.bits, preset="fast", progress=False
        )
        fresh = Judge.of(model, sentences(256, seed=1000 + seed))
        kept += float(fresh.losses(qmodel).mean()) <= 2e-4
        assert found.point.bytes < found.space.bytes().max(1).sum()  # it did choose
    assert kept >= 19


def test_a_drop_budget_serves_classifiers():
    model, batches = classifier()
    batches = [{"pixel_values": torch.randn(200, 3, 16, 16)}]
    found = qtk.search(model, "drop 10 %", batches, **FAST)
    assert found.metric == "kl" and found.point.measured.bound <= 0.1


def test_quantize_searches_and_quantizes_in_one_call():
    model, calib = encoder(), sentences(40)
    options = {"preset": "fast", "progress": False}
    qmodel = qtk.quantize(model, budget="0.8x bytes", calib=calib, **options)
    sizes = qtk.summary(qtk.quantize(model, calib=calib, **options)).bytes
    assert qtk.summary(qmodel).bytes <= 0.8 * sizes
    with pytest.raises(SchemeError, match="leave out"):
        qtk.quantize(model, 4, 8, budget="0.8x bytes", calib=calib)
    with pytest.raises(SchemeError, match="leave out"):
        qtk.quantize(model, bits={"*": (4, 8)}, budget="0.8x bytes", calib=calib)


@pytest.mark.parametrize("build", [bert.tiny, vit.tiny])
def test_a_search_without_any_data(build):
    model, _ = build()
    found = qtk.search(model, "0.8x bytes", **FAST)
    assert found.calib is None and found.point.measured.loss is None
    assert (found.sensitivity.effects[:, 1] > 0).any()
    json.dumps(found.to_dict(), allow_nan=False)


def test_what_is_skipped_is_not_searched():
    found = qtk.search(encoder(), "0.8x bytes", sentences(), skip=["*.0.*"], verify=False, **FAST)
    assert found.bits and not [name for name in found.bits if ".0." in name]
    with pytest.raises(SchemeError, match="nothing to choose"):
        qtk.search(encoder(), "0.8x bytes", sentences(), skip=["*"], **FAST)
    with pytest.raises(SchemeError, match="knows no colour"):
        qtk.search(encoder(), "0.8x bytes", sentences(), colour="red", **FAST)


def test_reports(tmp_path):
    found = qtk.search(encoder(), "0.8x bytes", sentences(), **FAST)
    text = found.table()
    for word in ("encoder.layer.0.qkv", "W8A8", "measured ms", "on this device", "+-"):
        assert word in text
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert set(data["bits"]) == set(found.bits)
    pytest.importorskip("matplotlib")
    found.plot(tmp_path / "front.svg")
    assert "predicted front" in (tmp_path / "front.svg").read_text()


def test_the_command_line(tmp_path, monkeypatch):
    from qtk.cli import app

    model, _ = bert.tiny()
    model.save_pretrained(tmp_path / "model")
    run = CliRunner().invoke
    out = run(app, ["search", str(tmp_path / "model"), "--budget", "0.8x bytes", "--scheme", "8,8",
                    "--scheme", "5,8", "--batch-size", "2", "--preset", "fast",
                    "--json"])  # fmt: skip
    assert out.exit_code == 0 and json.loads(out.stdout)["budget"] == ["0.8x bytes"]
    out = run(app, ["bench-ops", str(tmp_path / "model"), "--scheme", "8,8", "--scheme", "4,8",
                    "--batch-size", "2", "--preset", "fast"])  # fmt: skip
    assert out.exit_code == 0 and "of W8A8" in out.stdout
    out = run(app, ["quantize", str(tmp_path / "model"), str(tmp_path / "out"), "--budget",
                    "0.8x bytes", "--preset", "fast", "--json"])  # fmt: skip
    assert out.exit_code == 0 and (tmp_path / "out" / "config.json").exists()
    out = run(app, ["search", str(tmp_path / "model"), "--budget", "fast"])
    assert out.exit_code == 1 and "cannot be read" in out.stderr


def test_the_default_schemes_exist_and_hold_the_references():
    assert W8A8 in SCHEMES and FLOATS in SCHEMES
    assert space_of(encoder(), SCHEMES).shape == (8, len(SCHEMES))
    assert default_schemes(torch.device("cpu")) == QUICK
    assert share_of("auto:0.25") == 0.25


def test_solving_prints_nothing_to_stdout(capfd):
    import ctypes

    from qtk.mixed_precision.allocate import _stdout_to_stderr

    with _stdout_to_stderr():
        ctypes.CDLL(None).printf(b"said by C\n")
    out, err = capfd.readouterr()
    assert out == "" and "said by C" in err
