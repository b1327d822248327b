"""Random precision: codes of fewer bits, switching, the transfer matrix, and training for it."""

import copy
import re

import numpy as np
import pytest
import torch
from torch import nn

import qtk
from qtk.models import vit
from qtk.modules.linear import QuantLinear
from qtk.robust import precision_transfer, training
from qtk.robust.precision import lowered

NORMALIZE = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


@pytest.fixture(scope="module")
def eight():
    """A tiny ViT and the same in 8 bits, and pixels with the float model's answers."""
    torch.manual_seed(0)
    model, _ = vit.tiny()
    pixels = torch.randint(0, 256, (16, 3, 16, 16)) / 255
    qmodel = qtk.quantize(model, calib=[{"pixel_values": 2 * pixels - 1}], progress=False)
    with torch.no_grad():
        labels = model(pixel_values=2 * pixels - 1).logits.argmax(-1)
    return model, qmodel, pixels, labels


@pytest.mark.parametrize("bits", [4, 5, 6, 7, 8])
def test_fewer_bits_are_the_stored_codes_rounded(eight, bits):
    layer = next(m for m in eight[1].modules() if isinstance(m, QuantLinear))
    spec = layer.spec()
    fewer = lowered(spec, bits)
    w, a = fewer.scheme.w, fewer.scheme.a
    assert (w.bits, a.bits) == (bits, bits)
    assert fewer.codes.min() >= w.qmin and fewer.codes.max() <= w.qmax
    step = spec.steps.scale.abs() * 2 ** (8 - bits)
    error = (fewer.weight() - spec.weight()).abs()
    inside = fewer.codes < w.qmax  # the largest codes are clipped, by half a step more at most
    assert (error <= 0.5001 * step)[inside].all() and (error <= 1.0001 * step).all()
    scale, zero_point = fewer.grid.static
    ends = [(q - zero_point) * scale for q in (a.qmin, a.qmax)]
    wanted = [(q - spec.grid.zero_point) * spec.grid.scale for q in (-128, 127)]
    assert all(abs(x - y) <= scale for x, y in zip(ends, wanted, strict=True))


def test_switching_there_and_back_gives_the_same_bits(eight):
    _, qmodel, pixels, _ = eight
    x = 2 * pixels - 1
    with torch.no_grad():
        before = qmodel(pixel_values=x).logits
        random = qtk.random_precision(copy.deepcopy(qmodel))
        four = random.at(4, pixel_values=x)
        assert torch.equal(random.at(8, pixel_values=x), before)
        assert torch.equal(random.at(4, pixel_values=x), four) and not torch.equal(four, before)
        for layer in random.model.modules():  # what is computed is what the layer says it is
            if isinstance(layer, QuantLinear):
                y = torch.randn(3, layer.in_features)
                reference = layer.spec().reference(y)
                bound = 1e-4 * reference.abs().max() + 1e-5
                assert (layer(y) - reference).abs().max() <= bound


def test_what_is_kept_prepared_answers_as_what_is_prepared_anew(eight):
    """Also after gradients, for which layers give up what they share; and it is not made twice."""
    _, qmodel, pixels, _ = eight
    x = (2 * pixels - 1).requires_grad_()
    plain = qtk.random_precision(copy.deepcopy(qmodel))
    kept = qtk.random_precision(copy.deepcopy(qmodel), keep=True)
    assert len(kept.tensors()) == len(plain.tensors())
    for bits in (4, 8, 6, 4, 8, 6):
        kept.at(bits, pixel_values=x).sum().backward()
        with torch.no_grad():
            answers = [model.at(bits, pixel_values=x) for model in (plain, kept)]
        assert torch.equal(*answers)
    assert len(kept.tensors()) > len(plain.tensors())
    layer = next(m for m in kept.modules() if isinstance(m, QuantLinear))
    kept.switch(4)
    before = layer.snapshot()[2]
    kept.switch(8)
    kept.switch(4)
    assert layer.snapshot()[2] is before
    kept.float()  # whatever moves the model moves nothing that is kept
    assert len(kept.tensors()) == len(plain.tensors())


def test_each_sample_draws_its_own_bits_and_keeps_its_place(eight):
    _, qmodel, pixels, _ = eight
    x = 2 * pixels - 1
    random = qtk.random_precision(copy.deepcopy(qmodel), bits=(4, 8), seed=5)
    with torch.no_grad():
        either = {b: random.at(b, pixel_values=x) for b in (4, 8)}
        found = random(pixel_values=x).logits
        which = torch.stack([(found - either[b]).abs().amax(1) for b in (4, 8)])
        assert (which.amin(0) < 1e-5).all()  # a smaller batch is another order of sums
        assert 0 < int((which.argmin(0) == 0).sum()) < len(x)
        random.reseed(5)
        assert torch.equal(random(pixel_values=x).logits, found)
        assert not torch.equal(random(pixel_values=x).logits, found)
        random.draw = "batch"
        once = random(pixel_values=x).logits
        assert min(float((once - either[b]).abs().max()) for b in (4, 8)) < 1e-5


def test_gradients_are_of_the_bits_that_were_drawn(eight):
    """A switch between the forward and the backward pass changes nothing."""
    _, qmodel, pixels, _ = eight
    random = qtk.random_precision(copy.deepcopy(qmodel))
    grads = []
    for switched in (False, True):
        leaf = (2 * pixels - 1).requires_grad_()
        y = random.at(4, pixel_values=leaf)
        random.switch(8 if switched else 4)
        y[:, 0].sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("change, message", [
    ({"bits": (3, 8)}, "choose among"), ({"bits": ()}, "choose among"),
    ({"draw": "token"}, "choose among"),
])  # fmt: skip
def test_bad_requests_are_named(eight, change, message):
    with pytest.raises(qtk.SchemeError, match=message):
        qtk.random_precision(eight[1], **change)
    with pytest.raises(qtk.SchemeError, match=r"w=8 and a=8|quantize"):
        qtk.random_precision(eight[0])


def test_only_models_of_eight_bits_hold_all_precisions(pair):
    with pytest.raises(qtk.SchemeError, match="W4A4: quantize it with w=8"):
        qtk.random_precision(pair[1])


def test_a_random_model_is_attacked_by_one_who_knows(eight):
    model, qmodel, pixels, labels = eight
    random = qtk.random_precision(copy.deepcopy(qmodel))
    options = {"normalize": NORMALIZE, "budgets": ("large",), "steps": 3, "progress": False}
    data = pixels, labels
    runs = [qtk.robustness(model, random, data, "apgd_ce", **options) for _ in range(2)]
    assert runs[0].rows == runs[1].rows
    adaptive = runs[0].row("apgd_ce, over precisions", "large")
    worst = runs[0].row("worst case", "large")
    assert worst.accuracy_quantized <= adaptive.accuracy_quantized


class Steep(nn.Module):
    """Answers by one pixel at one precision and by another at the other."""

    bits = (4, 8)

    def __init__(self):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.now, self.places = 8, torch.Generator()

    def reseed(self, seed):
        self.places.manual_seed(seed)

    def at(self, bits, pixel_values):
        seen = pixel_values[:, 0, 0, 0 if bits == 4 else 1]
        return torch.stack([seen, -seen], 1) + self.anchor * 0

    def forward(self, pixel_values):
        drawn = torch.randint(2, (len(pixel_values), 1), generator=self.places) == 0
        x = pixel_values
        logits = torch.where(drawn, self.at(4, x), self.at(8, x))
        return type("Out", (), {"logits": logits})


def test_a_matrix_is_what_is_known_of_a_model_whose_precisions_have_nothing_in_common(tmp_path):
    """Attacked at one, it is wrong there and right at the other; at both, wrong at both."""
    pixels, labels = torch.full((200, 3, 2, 2), 0.51), torch.zeros(200).long()
    found = precision_transfer(Steep(), pixels, labels, normalize=NORMALIZE, budget=0.05, steps=10)
    by = dict(zip(found.attacks, found.accuracy, strict=True))
    drawn = {name: mean for name, (mean, _) in zip(found.attacks, found.drawn, strict=True)}
    assert by["clean"] == (1, 1) and by["4"][0] == 0 and by["8"][1] == 0
    assert by["all"] == (0, 0) and drawn["all"] == 0 and drawn["clean"] == 1
    # the other's pixel is where the random start left it: above .5 with probability .6
    for right in (by["4"][1], by["8"][0]):
        assert abs(right - 0.6) < 4 * (0.24 / 200) ** 0.5
    assert drawn["4"] == pytest.approx(by["4"][1] / 2, abs=4 * (0.25 / 2000) ** 0.5)
    assert found.best_fixed in (4, 8) and "attacked at" in found.table()
    assert found.to_dict()["samples"] == 200
    svg = found.plot(tmp_path / "matrix.svg")
    assert (tmp_path / "matrix.svg").read_text() == svg
    texts = re.findall(r">([^<>]+)</text>", svg)
    assert texts.count("100") >= 3 and texts.count("0") >= 4  # clean; and "all"
    with pytest.raises(qtk.SchemeError, match="above zero"):
        precision_transfer(Steep(), pixels, labels, normalize=NORMALIZE, steps=0)


def test_rounding_in_training_is_the_grids_and_its_gradient_is_one():
    x = torch.randn(50, requires_grad=True)
    y = training.rounded(x, x.detach().amin(), x.detach().amax(), 3)
    assert len(y.detach().unique()) <= 8
    step = float(x.detach().max() - x.detach().min()) / 7
    assert (y - x).abs().max() <= 0.75 * step  # zero is a code: the ends may lie half a step off
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones(50))


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(32, 2),
    )  # fmt: skip


def easy(n=96):
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(n) % 2
    pixels = 0.3 * torch.rand(n, 3, 6, 6, generator=generator) + 0.35
    pixels[labels == 1, 0] += 0.3
    return pixels, labels


@pytest.mark.parametrize("rule", training.RULES)
def test_training_learns_at_every_precision_with_norms_of_its_own(rule):
    pixels, labels = easy()
    losses = []
    trained = qtk.random_precision_training(
        net(), pixels, labels, bits=(4, 8), rule=rule, budget=4 / 255, epochs=12, batch_size=16,
        say=lambda epoch, epochs, loss: losses.append(loss),
    )  # fmt: skip
    assert len(losses) == 12 and losses[-1] < 0.5 * losses[0]
    norms = [m for m in trained.modules() if isinstance(m, training.SwitchableNorm)]
    assert len(norms) == 1
    four, eight = (norms[0].norms[f"{b}"] for b in (4, 8))
    assert not torch.equal(four.running_mean, eight.running_mean)
    found = precision_transfer(
        trained, pixels, labels, normalize=NORMALIZE, budget=4 / 255, steps=5
    )
    assert np.min(found.accuracy) > 0.9
    layers = [type(m).__name__ for m in trained.model.children()]
    assert layers.count("FakeQuantized") == 1 and layers[-1] == "Linear"  # the head stays float


def test_a_vit_trains_too_and_repeats_itself():
    model, _ = vit.tiny()
    pixels = torch.rand(8, 3, 16, 16)
    labels = torch.arange(8) % 5
    runs = [
        qtk.random_precision_training(model, pixels, labels, epochs=1, batch_size=4)
        for _ in range(2)
    ]
    with torch.no_grad():
        first, second = (run.at(4, pixel_values=pixels) for run in runs)
    assert torch.equal(first, second)
    assert not any(isinstance(m, training.FakeQuantized) for m in model.modules())  # a copy


@pytest.mark.parametrize("total", [1, 4, 5, 6, 100])
def test_the_rate_rises_over_a_fifth_and_falls_to_zero(total):
    shares = [training.share_of_rate(step, total) for step in range(total + 1)]
    assert max(shares) == 1 and min(shares[:-1]) > 0
    assert shares[-1] == 0 or total == 1  # a step's rate is set before it, the last one is not used
    peak = shares.index(1)
    assert peak <= total / 5 and shares[peak:] == sorted(shares[peak:], reverse=True)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"bits": (1,)}, "2 to 16"),
        ({"rule": "trades"}, "choose among"),
        ({"epochs": 0}, "above zero"),
    ],
)
def test_bad_training_is_named(change, message):
    with pytest.raises(qtk.SchemeError, match=message):
        qtk.random_precision_training(net(), *easy(4), **change)
