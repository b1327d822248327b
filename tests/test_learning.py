"""Block reconstruction and end-to-end tuning: what is learned, when it stops, how it goes on."""

import copy
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

import qtk
from qtk.assembly import quantized_layers
from qtk.errors import CheckpointError, SchemeError
from qtk.integrations.transformers import record_of
from qtk.learn import descent
from qtk.learn.block import learn_block
from qtk.learn.descent import Learned, Rates, Task, descend, split
from qtk.learn.model import learn_model
from qtk.learn.objective import output_error
from qtk.learn.trainable import TrainableLinear, trainable
from qtk.modules.linear import QuantLinear
from tests import zoo

SCHEMES = [
    {"w": 4, "a": 4},
    {"w": 4, "a": 4, "activations": "token"},
    {"w": 8, "a": 8, "method": "os+"},
    {"w": 3, "a": 16, "group_size": 5},
    {"w": 4, "a": 16, "group_size": 5, "weights": "asymmetric"},
]


def batches(n=9, name="BertModel"):
    generator = torch.Generator().manual_seed(1)
    shape = (4, 12)
    ids = [torch.randint(3, 99, shape, generator=generator) for _ in range(n)]
    return [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in ids]


def quantize(name="BertModel", **options):
    model, _ = zoo.build(name)
    return model, qtk.quantize(model, calib=batches(), progress=False, **options)


@pytest.mark.parametrize("options", SCHEMES)
def test_a_twin_computes_what_the_integers_do(options):
    _, qmodel = quantize(**options)
    for layer in quantized_layers(qmodel).values():
        x = torch.randn(3, 7, layer.in_features)
        wanted, got = layer(x), TrainableLinear(layer)(x)
        # the same products of the same codes: only the order of the float32 sums differs, and at
        # most a few inputs lie so near a rounding boundary that they fall on its other side
        close = (got - wanted).abs() <= 1e-5 * wanted.abs().max()
        assert close.all(-1).float().mean() > 0.9


@pytest.mark.parametrize("options", SCHEMES)
def test_what_was_not_learned_comes_back_bit_for_bit(options):
    _, qmodel = quantize(**options)
    before = copy.deepcopy(qmodel).state_dict()
    with trainable(qmodel):
        assert not any(isinstance(m, QuantLinear) for m in qmodel.modules())
    after = qmodel.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_error_while_learning_leaves_the_model_as_it_was():
    _, qmodel = quantize(w=4, a=4)
    layers = quantized_layers(qmodel)
    with pytest.raises(KeyboardInterrupt), trainable(qmodel):
        raise KeyboardInterrupt
    assert quantized_layers(qmodel) == layers


def test_a_learned_clip_of_tokens_stays_a_share_of_their_maximum():
    _, qmodel = quantize(w=4, a=4, activations="token", ranges="minmax")
    with trainable(qmodel) as twins:
        with torch.no_grad():
            for twin in twins.values():
                twin.log_input_scale.fill_(0.5)
        got = {name: twin.input_factor() for name, twin in twins.items()}
    assert all(float(factor) == 0 for factor in got.values())
    assert all(layer.input_clip == 1 for layer in quantized_layers(qmodel).values())


def test_every_parameter_gets_a_gradient():
    _, qmodel = quantize(w=4, a=4)
    with trainable(qmodel) as twins:
        out = qmodel(**batches(1)[0]).last_hidden_state
        out.square().sum().backward()
        for name, twin in twins.items():
            for parameter in (p for p in twin.parameters()):
                assert parameter.grad is not None, name
            if not name.endswith("key.bias"):  # softmax does not see a bias of the keys
                assert twin.offset.grad.abs().sum() > 0 and twin.log_scale.grad.abs().sum() > 0


@pytest.fixture
def steps(monkeypatch):
    """Sets how many steps are learned, and how long they are."""

    def set_to(number, **rates):
        path, options = "qtk.pipeline.learning", {"steps": number, **rates}
        monkeypatch.setattr(f"{path}.learn_block", partial(learn_block, **options))
        monkeypatch.setattr(f"{path}.learn_model", partial(learn_model, **options))

    return set_to


# GPTQ leaves so small a model nothing to learn
FROM_NEAREST = {"w": 3, "a": 4, "rounding": "nearest"}


@pytest.mark.parametrize("learn", ["block", "model"])
def test_learning_lowers_the_error_and_depends_on_the_seed_alone(learn, steps):
    steps(40)
    model, start = quantize(**FROM_NEAREST)
    results = [quantize(**FROM_NEAREST, learn=learn)[1] for _ in range(2)]

    def error(qmodel):
        return sum(
            float(output_error(qmodel(**b), model(**b), b["attention_mask"])) for b in batches()
        )

    assert error(results[0]) < error(start)
    learning = record_of(results[0]).recipe["learning"]
    assert learning["of"] == learn and learning["changed"]
    assert len(learning["held_out_loss"]) == (2 if learn == "block" else 1)
    assert all(layer.sqnr is None for layer in record_of(results[0]).layers.values())
    first, second = (m.state_dict() for m in results)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], value) for name, value in start.state_dict().items())


class Quadratic:
    """A stand-in layer whose loss is known."""

    kept, generator, bias, log_input_scale, input_zero_point = 1.0, None, None, None, None

    def __init__(self):
        self.offset, self.log_scale = torch.full((3, 4), 2.0), torch.zeros(3, 1)


def test_the_best_point_on_held_out_data_wins_even_if_it_is_the_first():
    layer = Quadratic()
    _, held_out = split(9)

    def loss(i):  # what is learned from pulls away from what is held out
        return (layer.offset - (2.0 if i in held_out else -5.0)).square().sum()

    learned = descend(Task([layer], loss, 9), 30, Rates(0.1, 0.1, 0.1), checks=5)
    assert learned == Learned(before=0, after=0)
    assert torch.equal(layer.offset.detach(), torch.full((3, 4), 2.0))


def test_batches_are_split_and_one_serves_for_both():
    for n in range(2, 40):
        learned_from, held_out = split(n)
        assert sorted(learned_from + held_out) == list(range(n)) and learned_from and held_out
    assert split(1) == ([0], [0])


def test_tuning_goes_on_where_it_was_interrupted(tmp_path, monkeypatch, steps):
    steps(20)
    options = {**FROM_NEAREST, "learn": "model"}
    whole = quantize(**options)[1].state_dict()
    file = tmp_path / "state"
    loss, calls = descent._held_out_loss, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return loss(*args)

    monkeypatch.setattr(descent, "_held_out_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize(**options, resume=file)
    assert (file / "learning.safetensors").exists() and not list(file.glob("*.part"))
    monkeypatch.setattr(descent, "_held_out_loss", loss)
    with pytest.raises(CheckpointError, match=r"another model, data, seed or scheme"):
        quantize(**{**options, "w": 4}, resume=file)
    resumed = quantize(**options, resume=file)[1].state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_finished_tuning_is_there_until_the_caller_deletes_it(tmp_path, monkeypatch, steps):
    steps(20)
    options = {**FROM_NEAREST, "learn": "model", "resume": tmp_path / "state"}
    first = quantize(**options)[1]
    assert record_of(first).recipe["learning"]["changed"]
    assert options["resume"].exists()

    def computed(*args):
        raise AssertionError("learned a second time")

    monkeypatch.setattr(descent, "_held_out_loss", computed)
    second = quantize(**options)[1]
    assert record_of(second).recipe == record_of(first).recipe
    first, second = first.state_dict(), second.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_end_for_want_of_patience_is_an_end_too(tmp_path, monkeypatch, steps):
    steps(24, rates=Rates(offset=50, scale=1, zero_point=50))
    options = {"w": 4, "a": 4, "rounding": "tuned", "resume": tmp_path / "state"}
    first = quantize(**options)[1].state_dict()
    done = load_file(options["resume"] / "learning.safetensors")
    assert done["done"] == 24 and done["since"] == 4
    monkeypatch.setattr(descent, "_held_out_loss", None)
    second = quantize(**options)[1].state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("rounding", ["tuned", "block"])
def test_learning_that_keeps_its_start_says_so(rounding, steps, caplog):
    steps(4, rates=Rates(offset=50, scale=1, zero_point=50))  # away from anything good
    _, qmodel = quantize(w=4, a=4, rounding=rounding)
    assert "nothing learned: held-out data did not confirm" in caplog.text
    record = record_of(qmodel)
    assert not record.recipe["learning"]["changed"]
    assert all(layer.sqnr is not None for layer in record.layers.values())
    assert "nothing, held-out data did not confirm" in qtk.summary(qmodel).table()
    start = quantize(w=4, a=4, rounding="gptq")[1].state_dict()
    assert all(torch.equal(start[name], value) for name, value in qmodel.state_dict().items())


@pytest.mark.parametrize("start", ["adaround", "flexround"])
def test_learning_starts_from_any_rounder(start, steps):
    steps(2)
    _, qmodel = quantize(w=3, a=4, rounding=start, learn="model")
    record = record_of(qmodel)
    assert record.recipe["rounding"] == start and record.recipe["learning"]["of"] == "model"
    assert {layer.recipe.rounding for layer in record.layers.values()} == {start}


def test_learning_without_data_is_refused():
    model, _ = zoo.build("BertModel")
    with pytest.raises(SchemeError, match="learns from data"):
        qtk.quantize(model, rounding="tuned", progress=False)


def test_a_state_that_cannot_be_kept_is_noticed_before_anything_is_computed(tmp_path, monkeypatch):
    def computed(*args, **options):
        raise AssertionError("something was computed")

    monkeypatch.setattr("qtk.pipeline.load_float", computed)
    (tmp_path / "broken").write_bytes(b"not a state")
    for resume, told in ((3, "give the path"), ("", "give the path"),
                         (tmp_path / "broken", "is a file"),
                         ("/nowhere/x", "'/nowhere', which is no folder")):  # fmt: skip
        with pytest.raises(SchemeError, match=told):
            quantize(rounding="tuned", resume=resume)


@pytest.mark.parametrize("name", zoo.ZOO)
def test_every_family_learns(name, steps):
    steps(2)
    model, batch = zoo.build(name)
    qmodel = qtk.quantize(model, 4, 4, calib=[batch], rounding="tuned", progress=False)
    with torch.no_grad():
        assert torch.isfinite(qmodel(**batch)[0]).all()


def test_automatic_bits_stay_within_their_share_and_help():
    model, plain = quantize(w=3, a=4)
    options = {"w": 3, "a": 4, "progress": False, "calib": batches()}
    auto = qtk.quantize(model, bits="auto:0.3", **options)
    layers = quantized_layers(auto)
    wide = {n: m for n, m in layers.items() if m.scheme.w.bits == 8}
    assert wide and all(m.scheme.a.bits == 8 for m in wide.values())
    count = {n: m.in_features * m.out_features for n, m in layers.items()}
    assert sum(count[n] for n in wide) <= 0.3 * sum(count.values())

    def error(qmodel):
        return sum(
            float(output_error(qmodel(**b), model(**b), b["attention_mask"])) for b in batches()
        )

    assert error(auto) < error(plain)


@pytest.mark.parametrize("bits", ["automatic", "auto:2", "auto:", "auto:x"])
def test_automatic_bits_are_checked(bits):
    model, batch = zoo.build("BertModel")
    if bits == "auto:":  # no number is the default
        qtk.quantize(model, 4, 8, calib=[batch], bits=bits, progress=False)
        return
    with pytest.raises(SchemeError, match="give 'auto'"):
        qtk.quantize(model, 4, 8, calib=[batch], bits=bits, progress=False)
