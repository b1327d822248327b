"""qtk.steal and InI's terms, against formulas written out and thieves whose loot is known."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification, ViTModel

import qtk
from qtk.discover import available, load
from qtk.errors import CalibrationError, ModelError, SchemeError
from qtk.models import bert, vit
from qtk.security import clone as clones
from qtk.security.cloning import Victim
from qtk.security.defence import isolate

CORNERS = [(0, 0), (0, 8), (8, 0), (8, 8)]


def squares(n, seed=0):
    """Images [n, 1, 16, 16] with one bright quarter, and which."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (n,), generator=generator)
    images = 0.3 * torch.randn(n, 1, 16, 16, generator=generator)
    for i, label in enumerate(labels.tolist()):
        row, column = CORNERS[label]
        images[i, :, row : row + 8, column : column + 8] += 1
    return images, labels


class Quarters(nn.Module):
    """Knows the brightest quarter."""

    main_input_name = "pixel_values"

    def __init__(self, sharpness=8.0):
        super().__init__()
        self.sharpness = nn.Parameter(torch.tensor(sharpness))

    def forward(self, images):
        return self.sharpness * torch.stack(
            [images[:, 0, r : r + 8, c : c + 8].mean((1, 2)) for r, c in CORNERS], 1
        )


POOLS = {"in": squares(300, 1)[0], "other": torch.randn(300, 1, 16, 16)}


@pytest.fixture(scope="module")
def small_vit():
    """A ViT that tells quarters apart."""
    torch.manual_seed(0)
    model, _ = vit.tiny()
    config = ViTConfig(**{**model.config.to_dict(), "num_channels": 1, "num_labels": 4})
    model, (images, labels) = ViTForImageClassification(config), squares(600, 2)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for step in range(60):
        chosen = torch.arange(step * 64, step * 64 + 64) % 600
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[chosen]).logits, labels[chosen]).backward()
        optimizer.step()
    return model.eval()


def test_real_images_give_the_model_away_and_a_quantized_one_as_well(small_vit, tmp_path):
    qmodel = qtk.quantize(small_vit, calib=[squares(64, 3)[0]], preset="fast", progress=False)
    test = squares(200, 4)
    found = qtk.steal(small_vit, qmodel, POOLS, test, answers=["soft", "hard"], epochs=6,
                      budget=200, seeds=(0, 1), progress=False)  # fmt: skip
    assert len(found.rows) == 8
    for row in found.rows:
        assert row.queries == 200 and len(row.clone_accuracies) == 2
        if row.pool == "in":
            assert row.clone_accuracy > 0.9 * row.victim_accuracy > 0.8
        assert row.victim == "quantized" or row.agreement == row.agreement_float
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert {row["victim"] for row in data["rows"]} == {"float", "quantized"}
    assert "knockoff, in, soft" in found.table() and "| knockoff | in |" in found.markdown()
    qtk.trust_page(found, tmp_path / "page.html")
    assert "Stealing" in (tmp_path / "page.html").read_text()


class Divergence(nn.Module):
    """KL of answers, which a thief of the other library is taught with."""

    def forward(self, logits, answers):
        return nn.functional.kl_div(logits.log_softmax(1), answers, reduction="batchmean")


def knockoff_of_art(victim, pool, test, budget, epochs, seed):
    """The accuracy of a clone made by the adversarial-robustness-toolbox."""
    from art.attacks.extraction import KnockoffNets
    from art.estimators.classification import PyTorchClassifier

    def wrapped(model, learns):
        optimizer = torch.optim.SGD(model.parameters(), clones.LR, clones.MOMENTUM,
                                    weight_decay=clones.DECAY) if learns else None  # fmt: skip
        return PyTorchClassifier(model, Divergence(), (1, 16, 16), 4, optimizer, device_type="cpu")

    class Answers(nn.Module):
        def forward(self, images):
            return victim.answers(images, "soft")

    np.random.seed(seed)
    torch.manual_seed(seed)
    thief = wrapped(clones.build("cnn", 1, 4, 100 + seed), True)
    attack = KnockoffNets(wrapped(Answers(), False), batch_size_fit=clones.BATCH, nb_epochs=epochs,
                          nb_stolen=budget, sampling_strategy="random", use_probability=True,
                          verbose=False)  # fmt: skip
    stolen = attack.extract(pool.numpy(), None, thieved_classifier=thief)
    return float((stolen.predict(test[0].numpy()).argmax(1) == test[1].numpy()).mean())


def test_knockoff_steals_as_much_as_that_of_another_library(small_vit):
    """As far apart as seeds are, at most; ours has a cosine, theirs a constant rate."""
    pytest.importorskip("art")
    test, pools = squares(400, 4), {"in": POOLS["in"], "other": POOLS["other"]}
    found = qtk.steal(small_vit, small_vit, pools, test, answers=["soft"], budget=250, epochs=8,
                      progress=False)  # fmt: skip
    for row in found.rows[::2]:
        theirs = [
            knockoff_of_art(Victim(small_vit), pools[row.pool], test, 250, 8, seed)
            for seed in (0, 1, 2)
        ]
        ours = row.clone_accuracies
        spread = max(max(ours) - min(ours), max(theirs) - min(theirs))
        assert abs(np.mean(ours) - np.mean(theirs)) <= spread + 0.02, (row.pool, ours, theirs)


@pytest.mark.parametrize("name", available("security.thief"))
def test_every_thief_keeps_its_budget_and_the_range_and_repeats_itself(name):
    victim, pool = Victim(Quarters()), POOLS["in"]

    def learn(inputs, answers):
        return clones.teach(clones.cnn(1, 4), inputs, answers, 1, 0)

    def queries(budget):
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(5)
        return load("security.thief", name).queries(
            lambda x: victim.answers(x, "soft"), pool, budget, generator, learn
        )

    found = queries(250)
    assert found.shape == (250, 1, 16, 16) and torch.equal(found, queries(250))
    assert len(queries(7)) == 7
    span = pool.max() - pool.min()
    assert found.min() >= pool.min() - 1e-5 * span and found.max() <= pool.max() + 1e-5 * span


def test_jacobian_steps_are_signs_of_the_slope():
    """With a linear clone the slope is its weight: each new image is known."""
    weight = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    linear = nn.Sequential(nn.Flatten(), nn.Linear(256, 4, bias=False))
    linear[1].weight.data.copy_(weight)
    pool, victim = POOLS["in"], Victim(Quarters())
    found = load("security.thief", "jacobian").queries(
        lambda x: victim.answers(x, "hard"), pool, 8, torch.Generator().manual_seed(0),
        lambda inputs, answers: linear, seeds=4,
    )  # fmt: skip
    chosen = victim.classes(found[:4])
    step = 0.1 * weight[chosen].sign().view(4, 1, 16, 16)
    assert torch.equal(found[4:], (found[:4] + step).clamp(pool.min(), pool.max()))


def test_noise_has_a_spectrum_of_one_over_f():
    pool = torch.stack([torch.zeros(1, 64, 64), torch.ones(1, 64, 64)])
    drawn = load("security.thief", "noise").queries(
        lambda x: x, pool, 200, torch.Generator().manual_seed(0), lambda x, y: nn.Identity()
    )
    power = torch.fft.rfft2(drawn - drawn.mean((2, 3), keepdim=True)).abs().mean((0, 1))
    # along one axis amplitude times frequency is constant: 16 times the frequency, a 16th
    assert abs(float(power[0, 1] / power[0, 16]) / 16 - 1) < 0.35


def test_answers_are_what_an_api_would_give():
    victim = Victim(Quarters(3.0))
    logits = victim.logits(POOLS["in"][:9])
    hard = victim.answers(POOLS["in"][:9], "hard")
    assert torch.equal(hard.argmax(1), logits.argmax(1)) and hard.unique().tolist() == [0, 1]
    soft = victim.answers(POOLS["in"][:9], "rounded")
    assert torch.allclose(soft.sum(1), torch.ones(9))
    # two decimals, then scaled by a sum that four roundings of .005 may move
    assert (soft - logits.softmax(1)).abs().max() < 0.005 + 0.02


def test_finished_clones_are_not_made_again(tmp_path, monkeypatch):
    made, real = [], clones.teach
    module = __import__("qtk.security.cloning", fromlist=["teach"])
    monkeypatch.setattr(module, "teach", lambda *a: made.append(1) or real(*a))
    ask = {"epochs": 1, "budget": 50, "seeds": (0,), "answers": ["hard"], "progress": False}

    def run(model, **more):
        before = len(made)
        found = qtk.steal(model, model, POOLS, squares(50, 4), **{**ask, **more}, resume=tmp_path)
        return found, len(made) - before

    first, number = run(Quarters())
    assert number == 2  # two pools; float and quantized are the same model here
    again, none = run(Quarters())
    assert none == 0 and [r.clone_accuracies for r in again.rows] == [
        r.clone_accuracies for r in first.rows
    ]
    assert run(Quarters(2.0))[1] == 2 and run(Quarters(), budget=49)[1] == 2


def test_distances_of_ini_by_hand():
    victim, student = torch.tensor([[3.0, 1.0]]), torch.tensor([[0.0, 0.5]])
    # centred: [1, -1]; the student is not
    assert float(isolate.distance(victim, student)) == (1 + 1.5) / 2
    p, q = student.softmax(1), victim.softmax(1)
    expected = (p * (p / q).log()).sum()
    assert abs(float(isolate.divergence(student, victim) - expected)) < 1e-6
    assert float(isolate.divergence(victim, victim)) == 0


def test_the_thiefs_gradient_vanishes_where_both_agree_and_is_that_of_finite_differences():
    torch.manual_seed(0)
    student = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double()
    terms = isolate._Terms(student, 0, 0.3, 1, 1)
    x = torch.randn(5, 1, 2, 2).double()
    own = student(x).detach()
    assert terms.gradient(isolate.divergence(student(x), own)).abs().max() < 1e-12
    victim = torch.randn(5, 3).double()
    found = terms.gradient(isolate.divergence(student(x), victim)).detach()
    weight, step = student[1].weight, 1e-6
    with torch.no_grad():
        weight[1, 2] += step
        up = isolate.divergence(student(x), victim)
        weight[1, 2] -= 2 * step
        down = isolate.divergence(student(x), victim)
    assert abs(float((up - down) / (2 * step) - found[1 * 4 + 2])) < 1e-8


def test_conflicting_gradients_are_projected_and_averaged():
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0])
    found = isolate.project([a, b], torch.Generator().manual_seed(0))
    # a - (a.b / b.b) b = (.5, .5);  b - (b.a / a.a) a = (0, 1)
    assert torch.allclose(found, torch.tensor([0.25, 0.75]))
    agreeing = isolate.project([a, torch.tensor([1.0, 1.0])], torch.Generator())
    assert torch.allclose(agreeing, torch.tensor([1.0, 0.5]))


@pytest.mark.parametrize("pcgrad", [True, False])
def test_hardening_lowers_what_a_thief_could_learn_from(small_vit, pcgrad):
    log, outside = [], 1.5 * torch.randn(300, 1, 16, 16)
    hard = isolate.harden(small_vit, squares(512, 2), outside, epochs=6, pcgrad=pcgrad, log=log,
                          progress=False)  # fmt: skip
    assert log[-1].induction < log[0].induction and log[-1].isolation < log[0].isolation
    images, labels = squares(200, 4)
    assert (Victim(hard).classes(images) == labels).float().mean() > 0.9
    assert type(hard) is type(small_vit) and hard is not small_vit and not hard.training


def test_epsilon_is_for_a_student_of_the_released_size(small_vit, monkeypatch):
    seen = {}
    real = isolate._Terms

    def spy(*given):
        seen["epsilon"] = given[-1]
        return real(*given)

    monkeypatch.setattr(isolate, "_Terms", spy)
    student = nn.Sequential(nn.Flatten(), nn.Linear(256, 4, bias=False))
    isolate.harden(small_vit, squares(16), POOLS["other"], student, epochs=1, progress=False)
    assert abs(seen["epsilon"] / 1000 - (1024 / 11.2e6) ** 0.5) < 1e-9


def test_what_cannot_be_stolen_or_hardened_says_why(small_vit):
    test, model = squares(20, 4), Quarters()
    with pytest.raises(CalibrationError, match="as 'in'"):
        qtk.steal(model, model, {"other": POOLS["other"]}, test)
    with pytest.raises(CalibrationError, match="training images, number 0"):
        qtk.steal(model, model, POOLS, test, train=POOLS["in"][:1], progress=False)
    with pytest.raises(CalibrationError, match="same size"):
        qtk.steal(model, model, {**POOLS, "x": torch.zeros(2, 3, 16, 16)}, test)
    with pytest.raises(CalibrationError, match="4 classes"):
        qtk.steal(model, model, POOLS, (test[0], test[1] + 1))
    with pytest.raises(CalibrationError, match="class number"):
        qtk.steal(model, model, POOLS, (test[0], test[1][:-1]))
    with pytest.raises(SchemeError, match="no answers 'loud'"):
        qtk.steal(model, model, POOLS, test, answers=["loud"])
    with pytest.raises(SchemeError, match="no 'maze' in qtk/security"):
        qtk.steal(model, model, POOLS, test, thief=["maze"])
    with pytest.raises(SchemeError, match="no network 'rnn'"):
        qtk.steal(model, model, POOLS, test, clone="rnn", progress=False)
    headless = ViTModel(vit.tiny()[0].config)
    text, _ = bert.tiny()
    for wrong in (headless, text):
        images = torch.zeros(2, 3, 16, 16)
        with pytest.raises(ModelError, match="does not classify images"):
            qtk.steal(wrong, wrong, {"in": images, "o": images}, (images, torch.tensor([0, 1])))
    qmodel = qtk.quantize(small_vit, calib=[test[0]], preset="fast", progress=False)
    with pytest.raises(ModelError, match="trains the float model"):
        isolate.harden(qmodel, test, POOLS["other"])
    with pytest.raises(SchemeError, match="not negative"):
        isolate.harden(small_vit, test, POOLS["other"], gamma=-1)
    with pytest.raises(CalibrationError, match="same size"):
        isolate.harden(small_vit, test, torch.zeros(2, 3, 16, 16))
    with pytest.raises(ModelError, match="no classifier head"):
        isolate.harden(SimpleHead(), test, POOLS["other"])


class SimpleHead(nn.Module):
    def forward(self, images):
        return SimpleNamespace(logits=None, start_logits=None, prediction_logits=None)
