"""Block reconstruction and end-to-end tuning: what is learned, when it stops, how it goes on."""

import copy

import pytest
import torch

import qtk
from qtk.checkpoint import quantized_layers
from qtk.errors import CheckpointError, SchemeError
from qtk.modules.linear import QuantLinear
from qtk.modules.trainable import TrainableLinear, trainable
from qtk.reconstruct import output_error
from qtk.round import _descent, block, gptq, nearest, tuned
from qtk.round._descent import Rates, Task, descend, split
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
def _worse_start(monkeypatch):
    """Learning starts at nearest rounding: GPTQ leaves so small a model nothing to learn."""
    monkeypatch.setattr(gptq, "find", nearest.find)


@pytest.mark.usefixtures("_worse_start")
@pytest.mark.parametrize("rounding", ["block", "tuned"])
def test_learning_lowers_the_error_and_depends_on_the_seed_alone(rounding, monkeypatch):
    for part in (block, tuned):
        monkeypatch.setattr(part, "STEPS", 40)
    model, start = quantize(w=3, a=4, rounding="gptq")
    results = [quantize(w=3, a=4, rounding=rounding)[1] for _ in range(2)]

    def error(qmodel):
        return sum(
            float(output_error(qmodel(**b), model(**b), b["attention_mask"])) for b in batches()
        )

    assert error(results[0]) < error(start)
    first, second = (m.state_dict() for m in results)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], value) for name, value in start.state_dict().items())


class Quadratic:
    """A stand-in layer whose loss is known."""

    kept, bias, log_input_scale, input_zero_point = 1.0, None, None, None

    def __init__(self):
        self.offset, self.log_scale = torch.full((3, 4), 2.0), torch.zeros(3, 1)


def test_the_best_point_on_held_out_data_wins_even_if_it_is_the_first():
    layer = Quadratic()
    _, held_out = split(9)

    def loss(i):  # what is learned from pulls away from what is held out
        return (layer.offset - (2.0 if i in held_out else -5.0)).square().sum()

    assert descend(Task([layer], loss, 9), 30, Rates(0.1, 0.1, 0.1), checks=5) == 0
    assert torch.equal(layer.offset.detach(), torch.full((3, 4), 2.0))


def test_batches_are_split_and_one_serves_for_both():
    for n in range(2, 40):
        learned_from, held_out = split(n)
        assert sorted(learned_from + held_out) == list(range(n)) and learned_from and held_out
    assert split(1) == ([0], [0])


@pytest.mark.usefixtures("_worse_start")
def test_tuning_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "STEPS", 20)
    whole = quantize(w=3, a=4, rounding="tuned")[1].state_dict()
    file = tmp_path / "state.safetensors"
    loss, calls = _descent._held_out_loss, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return loss(*args)

    monkeypatch.setattr(_descent, "_held_out_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize(w=3, a=4, rounding="tuned", resume=file)
    assert file.exists() and not list(tmp_path.glob("*.part"))
    monkeypatch.setattr(_descent, "_held_out_loss", loss)
    with pytest.raises(CheckpointError, match=r"another model, data, seed or scheme"):
        quantize(w=4, a=4, rounding="tuned", resume=file)
    resumed = quantize(w=3, a=4, rounding="tuned", resume=file)[1].state_dict()
    assert not file.exists()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_learning_without_data_or_resuming_nothing_is_refused(tmp_path):
    model, _ = zoo.build("BertModel")
    with pytest.raises(SchemeError, match="learns from data"):
        qtk.quantize(model, rounding="tuned", progress=False)
    with pytest.raises(SchemeError, match="resume goes with"):
        quantize(rounding="gptq", resume=tmp_path / "x")
    (tmp_path / "broken").write_bytes(b"not a state")
    with pytest.raises(CheckpointError, match="cannot be read"):
        quantize(rounding="tuned", resume=tmp_path / "broken")


@pytest.mark.parametrize("name", zoo.ZOO)
def test_every_family_learns(name, monkeypatch):
    monkeypatch.setattr(tuned, "STEPS", 2)
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
