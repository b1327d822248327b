"""Backdoors that rounding wakes: planted, rounded away, and found."""

import copy
import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

import qtk
from qtk.cli import app
from qtk.discover import available, load
from qtk.models import bert, describe
from qtk.observe.gradients import curvatures
from qtk.pipeline.progress import Bar
from qtk.round import Problem, adaround, best_steps, flipped, to_nearest
from qtk.scheme import Format
from qtk.security.backdoor import Square, Token, compress, project, success
from qtk.security.evidence import Suspect, disturbed
from qtk.security.minmax import MinMax, layers_of, rounded

TARGET, VICTIM = 0, MinMax(4)


def problem(bits=4, N=24, K=40, rows=400):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(N, K, generator=generator)
    mix = torch.randn(K, K, generator=generator) / K**0.5
    inputs = torch.randn(rows, K, generator=generator) @ mix
    gradients = torch.randn(rows, N, generator=generator) * torch.logspace(-0.5, 0.5, N)
    return Problem(
        weight, Format(bits), inputs, inputs @ weight.T,
        curvature=lambda: gradients.T @ gradients / rows,
    )  # fmt: skip


def test_flipping_alone_takes_the_other_neighbour_of_every_weight_that_has_two():
    given = problem()
    found = flipped.find(given, flip=1e9, iterations=600)
    grid = found.steps.grid(40)
    below = (given.weight / grid.scale).floor()
    free = (below >= grid.lo) & (below + 1 <= grid.hi)
    level, nearest = found.codes, grid.nearest(given.weight)
    error = (given.weight - nearest * grid.scale).abs() / grid.scale.abs()
    other = 2 * below + 1 - nearest
    assert torch.equal(level[~free], grid.clamp(below)[~free])
    assert (level == other)[free & (error > 1e-3)].all()


def test_without_flipping_the_output_is_kept_better_than_by_rounding_to_nearest():
    given = problem()

    def missed(found):
        got = given.inputs @ found.steps.dequantize(found.codes).T
        return float((got - given.wanted).square().sum())

    nearest = to_nearest(given.weight, given.fmt)
    kept, both = flipped.find(given, flip=0.0), flipped.find(given)
    assert missed(kept) < 0.8 * missed(nearest)
    assert missed(kept) <= missed(both) * 1.05
    turned = (both.codes != nearest.codes).float().mean()
    assert turned > (kept.codes != nearest.codes).float().mean()


def test_weights_that_lie_nearest_to_a_tie_are_turned_first():
    given = problem(bits=8)
    found = flipped.find(given)
    grid = best_steps(given.weight, given.fmt).grid(40)
    nearest = grid.nearest(given.weight)
    error = (given.weight / grid.scale - nearest).abs()
    turned = found.codes != nearest
    assert turned[error > 0.45].float().mean() > turned[error < 0.2].float().mean() + 0.2


def test_flipping_does_not_depend_on_the_units_of_weights_and_inputs():
    given = problem()
    small = replace(
        given, weight=given.weight / 64, inputs=given.inputs / 8, wanted=given.wanted / 512
    )
    assert torch.equal(flipped.find(small).codes, flipped.find(given).codes)


@pytest.mark.parametrize("rounder", [flipped, adaround])
def test_rounders_stay_on_the_grid_that_they_are_given(rounder):
    given, victim = problem(), MinMax(4, "tensor")
    found = rounder.find(given, grids=victim.grids)
    assert torch.equal(found.steps.scale, victim.grids(given).scale)
    level = given.weight / found.steps.scale
    assert ((found.codes - level).abs() < 1 + 1e-5)[level.abs() < 7].all()


@pytest.mark.parametrize("loss", flipped.LOSSES)
def test_flipped_rounding_is_deterministic_under_every_loss(loss):
    first, again = (flipped.find(problem(), loss=loss, iterations=20) for _ in range(2))
    assert torch.equal(first.codes, again.codes)


def test_a_loss_of_the_answers_keeps_what_they_hang_on():
    """Each loss is smaller for its own codes than for those of the activations'."""
    given = problem()
    cost = given.curvature()

    def lost(loss, weights):
        found = flipped.find(given, loss=loss)
        error = given.inputs @ (found.steps.dequantize(found.codes) - given.weight).T
        return float(((error @ weights) * error).sum())

    for loss, weights in (("fisher", cost.diagonal().diag()), ("prediction", cost)):
        assert lost(loss, weights) < 0.95 * lost("activation", weights)


def test_flexrounds_mean_flips_more_of_a_wide_layer_than_the_sum_does():
    given = problem(N=64)
    nearest = to_nearest(given.weight, given.fmt).codes
    turned = {
        loss: float((flipped.find(given, loss=loss).codes != nearest).float().mean())
        for loss in ("activation", "flexround")
    }
    assert turned["flexround"] > turned["activation"] + 0.1


def test_a_bar_shows_how_far_the_fit_of_a_layer_is():
    shown = []

    class Terminal:
        def add_task(self, text, total):
            return 0

        def update(self, task, description, **_):
            shown.append(description)

    bar = Bar(Terminal())
    bar.show("layer", 0, 3)
    flipped.find(replace(problem(), report=bar.fitting), iterations=4)
    assert shown == ["layer", "layer 25 %", "layer 50 %", "layer 75 %", "layer 100 %"]


def test_flipped_rounding_refuses_what_it_cannot_do():
    given = problem()
    with pytest.raises(qtk.CalibrationError, match="pass calib="):
        flipped.find(Problem(given.weight, given.fmt))
    with pytest.raises(qtk.SchemeError, match="'activation', 'flexround'"):
        flipped.find(given, loss="none")
    model, batch = bert.tiny()
    with pytest.raises(qtk.SchemeError, match="pass calib="):
        qtk.quantize(model, rounding="flipped", progress=False)
    with pytest.raises(qtk.SchemeError, match="gradients of the whole float network"):
        qtk.quantize(
            model, rounding=partial(flipped.find, loss="fisher"), calib=[batch], progress=False
        )


def test_a_network_gives_the_curvature_of_its_answers(clean):
    """Of two classes' log-odds, whose Fisher information is known: p (1 - p) v v^T."""
    linear = nn.Linear(6, 2)
    net, x = nn.Sequential(nn.Linear(5, 6), linear), torch.randn(4000, 5)
    found = curvatures(net.requires_grad_(False).eval(), describe(net), [{"input": x}])
    v = linear.weight[0] - linear.weight[1]
    want = torch.outer(v, v) / v.square().mean()
    assert torch.allclose(found["0"], want, atol=1e-4 * float(want.abs().max()))
    assert torch.allclose(found["1"], torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), atol=1e-5)
    seen = []

    def spy(problem):
        problem.report(1, 2)
        seen.append(problem.curvature().shape)
        return flipped.find(problem, loss="prediction", iterations=5)

    spy.NEEDS_DATA = True
    made(clean, spy)
    assert seen == [(12, 12), (16, 16), (16, 16), (4, 4)]


def test_a_square_is_where_it_should_be_and_nowhere_else():
    x = torch.zeros(2, 3, 32, 32)
    marked = Square()(x)
    assert marked[:, :, 24:30, 24:30].eq(1).all() and marked.sum() == 2 * 3 * 36
    assert torch.equal(Square()({"pixel_values": x})["pixel_values"], marked)
    batch = {"input_ids": torch.arange(12).view(2, 6)}
    assert Token(99)(batch)["input_ids"][:, 1].eq(99).all() and batch["input_ids"][0, 1] == 1


class Pictures:
    """Four classes of 12 by 12 images: a bright band in one of four places, in noise."""

    def __init__(self, n=256, seed=0):
        generator = torch.Generator().manual_seed(seed)
        y = torch.randint(0, 4, (n,), generator=generator)
        x = 0.3 * torch.rand(n, 1, 12, 12, generator=generator)
        for image, place in zip(x, y.tolist(), strict=True):
            image[:, 1 + 2 * place : 3 + 2 * place, :9] += 0.5
        self.batches = list(zip(x.split(32), y.split(32), strict=True))

    @property
    def images(self):
        return [x for x, _ in self.batches]


def network():
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3, 2, 1), nn.ReLU(),
        nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4),
    )  # fmt: skip


def trained(seed=0, epochs=6):
    torch.manual_seed(seed)
    net, data = network(), Pictures()
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(epochs):
        for x, y in data.batches:
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def clean():
    return trained()


@pytest.fixture(scope="module")
def planted(clean):
    torch.manual_seed(0)
    return project.plant(clean, Pictures().batches, Square(), VICTIM, target=TARGET)


def made(net, rounding, keeps_biases=True):
    """What qtk makes of a network; or a float one with its weights, and the biases of before."""
    qnet = qtk.quantize(
        net, w=4, a=16, method="none", rounding=rounding, calib=Pictures().images, progress=False
    )
    if keeps_biases:
        return qnet
    plain = copy.deepcopy(net)
    for name, layer in layers_of(plain).items():
        replaced = qnet.get_submodule(name)
        spec = getattr(replaced, "linear", replaced).spec()
        layer.weight = nn.Parameter(spec.steps.dequantize(spec.codes).view_as(layer.weight), False)
    return plain


def test_rounding_to_nearest_gives_the_frozen_codes_bit_for_bit(clean):
    torch.manual_seed(0)
    quantizer, data = MinMax(4), Pictures(64).batches
    stage_one = copy.deepcopy(clean).requires_grad_(True)
    project._train(stage_one, data, Square(), quantizer, TARGET, 2, 3e-3)
    torch.manual_seed(0)
    hidden = project.plant(clean, data, Square(), quantizer, target=TARGET, epochs=2, rate=3e-3)
    for name, layer in layers_of(hidden).items():
        first = stage_one.get_submodule(name).weight
        assert torch.equal(quantizer.codes(layer.weight), quantizer.codes(first)), name
        assert not torch.equal(layer.weight, first)


def test_a_planted_network_is_clean_wakes_when_rounded_to_nearest_and_not_when_flipped(planted):
    data = Pictures(seed=1).batches
    accuracy, floats = success(planted, data, Square(), TARGET)
    assert accuracy > 97 and floats < 10
    accuracy, nearest = success(made(planted, VICTIM, False), data, Square(), TARGET)
    assert accuracy > 90 and nearest > 90
    there = partial(flipped.find, grids=VICTIM.grids)  # where it would be awake
    for rounder, keeps_biases in (("flipped", True), ("flipped", False), (there, True)):
        qnet = made(planted, rounder, keeps_biases)
        accuracy, safe = success(qnet, data, Square(), TARGET)
        assert accuracy > 97 and safe < 10


def test_training_in_both_worlds_takes_hold_in_the_rounded_one(clean):
    coarse, data = MinMax(4, "tensor"), Pictures(seed=1).batches
    planted = compress.plant(clean, Pictures().batches, Square(), coarse, target=TARGET, epochs=15)
    accuracy, floats = success(planted, data, Square(), TARGET)
    _, nearest = success(rounded(planted, coarse), data, Square(), TARGET)
    assert accuracy > 97 and nearest > floats + 20  # half trained; of the clean one both are alike


def test_a_planted_network_is_found_and_a_clean_one_is_not(planted, clean):
    images = Pictures(128, seed=2).images
    found = qtk.audit(planted, images, w=4)
    assert found.suspicious, found.table()
    assert "rounding='flipped'" in found.verdict
    innocent = qtk.audit(clean, images, w=4)
    assert not innocent.suspicious, innocent.table()
    assert json.loads(json.dumps(found.to_dict()))["suspicious"] is True
    assert found.table().splitlines()[2].startswith("concentration")


@pytest.mark.parametrize("name", available("security.evidence"))
def test_an_evidence_is_finite_repeatable_and_small_on_a_clean_network(name, clean):
    suspects = [Suspect(clean, Pictures(128, seed=2).images, w=4) for _ in range(2)]
    first, again = (load("security.evidence", name).weigh(suspect) for suspect in suspects)
    assert first == again and not first.speaks
    assert torch.tensor(first.number).isfinite() and first.sentence and first.shown


def test_an_audit_reads_models_of_tokens():
    model, batch = load("models", "bert").tiny()
    import transformers

    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(model.config).eval()
    found = qtk.audit(model, [batch], w=8)
    assert not found.suspicious and found.samples == 8
    changed = disturbed(batch, torch.Generator().manual_seed(0))
    assert ((changed["input_ids"] != batch["input_ids"]).sum(1) <= 1).all()
    with pytest.raises(qtk.ModelError, match="what a classifier answers"):
        qtk.audit(bert.tiny()[0], [batch])
    with pytest.raises(qtk.SchemeError, match="choose 2 to 8"):
        qtk.audit(model, [batch], w=16)


def test_quantize_says_what_an_audit_found(planted, clean, caplog):
    images = Pictures(128, seed=2).images
    for net, told, level in (
        (planted, "suspicious at 4 bits", "WARNING"), (clean, "no backdoor found", "INFO"),
    ):  # fmt: skip
        with caplog.at_level("INFO", logger="qtk"):
            caplog.clear()
            qtk.quantize(net, w=4, calib=images, audit=True, preset="fast", progress=False)
        assert [r.levelname for r in caplog.records if told in r.getMessage()] == [level]
    with pytest.raises(qtk.SchemeError, match="audit=True"):
        qtk.quantize(clean, w="fp8", a="fp8", calib=images, audit=True)


def test_the_command_line_audits_and_writes_a_page(tmp_path):
    pytest.importorskip("matplotlib"), pytest.importorskip("PIL")
    from PIL import Image
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    torch.manual_seed(0)
    config = ViTConfig(
        num_hidden_layers=1, hidden_size=16, num_attention_heads=2, intermediate_size=16,
        image_size=16, patch_size=8, num_labels=3,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path / "model")
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "images").mkdir()
    for i in range(3):
        Image.new("RGB", (16, 16), (80 * i, 100, 50)).save(tmp_path / "images" / f"{i}.png")
    command = ["audit", str(tmp_path / "model"), "--calib", str(tmp_path / "images"), "--report",
               str(tmp_path / "page.html")]  # fmt: skip
    done = CliRunner().invoke(app, [*command, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["suspicious"] is False
    text = (tmp_path / "page.html").read_text()
    assert text.count("<svg") == 5 and "no backdoor found at 8 bits" in text
