"""Ratings against hand counts, the assessor's terms, and patches that must look natural."""

import io
import json
import math

import numpy as np
import pytest
import torch

import qtk
from qtk.errors import CalibrationError, ModelError, SchemeError
from qtk.physical import naturalness as dpa
from qtk.physical import ratings, scores
from qtk.physical.assessment import assess, map_correlation, ranks, spearman
from qtk.physical.front import CONTROLS, hypervolume
from qtk.report import picture
from qtk.robust.attack import patch as square

BLANK = torch.full((1, 3, 32, 32), 0.5)
BOX = torch.tensor([[8, 10, 16, 18]])


def pictures(n, size=24, seed=0):
    """Smooth images, as photographs are."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 4, 4, generator=generator)
    return torch.nn.functional.interpolate(coarse, size, mode="bilinear")


def test_lab_of_known_colours():
    seen = ratings.lab(torch.tensor([[1.0, 1, 1], [1, 0, 0], [0, 0, 0]]).T.reshape(1, 3, 1, 3))
    want = torch.tensor([[100, 0, 0], [53.24, 80.09, 67.20], [0, 0, 0]])
    assert (seen[0, :, 0].T - want).abs().max() < 0.05


def test_the_formula_counts_area_colour_and_variation():
    area = 4 * 64 / 1024
    same = ratings.truth(BLANK, BLANK, BOX)
    assert math.isclose(float(same), 1 + 4 * math.exp(-area), rel_tol=1e-5)
    grey = BLANK.clone()
    grey[:, :, 10:18, 8:16] = 0.7
    lightness = [float(ratings.lab(torch.full((1, 3, 1, 1), v))[0, 0]) for v in (0.5, 0.7)]
    want = 1 + 4 * math.exp(-area - (lightness[1] - lightness[0]) / 40)
    assert math.isclose(float(ratings.truth(BLANK, grey, BOX)), want, rel_tol=1e-4)
    rough, ground = BLANK.clone(), BLANK.clone()
    ground[..., ::2] += 0.01  # so that there is something to vary more than
    rough[:, :, 10:18, 8:16:2] += 0.2
    rough[:, :, 10:18, 9:16:2] -= 0.2
    assert float(ratings.truth(ground, rough, BOX)) < 1.1


def test_kinds_become_less_natural_from_left_to_right():
    rated = ratings.draw(pictures(400), 3)
    means = [float(rated.truth[rated.kinds == kind].mean()) for kind in range(len(ratings.KINDS))]
    assert means[0] > means[2] > means[3] > means[4] and means[1] > means[2]
    assert rated.truth.min() >= 1 and rated.truth.max() <= 5
    changed = (rated.images - rated.clean).abs().amax(1) > 0.5 / 255
    rounded = (rated.clean * 255).round() / 255
    for image, clean, box in zip(rated.images, rounded, rated.boxes.tolist(), strict=True):
        inside = torch.zeros(24, 24, dtype=torch.bool)
        inside[box[1] : box[3], box[0] : box[2]] = True
        assert torch.equal(image[:, ~inside], clean[:, ~inside])
    assert changed.flatten(1).any(1).float().mean() > 0.9
    again = ratings.draw(pictures(400), 3)
    assert torch.equal(rated.images, again.images) and torch.equal(rated.truth, again.truth)


def test_ratings_are_shares_around_the_truth_and_gazes_lie_on_the_patch():
    found = ratings.ratings_of(torch.tensor([1.0, 3.0, 4.2]))
    assert torch.allclose(found.sum(1), torch.ones(3)) and found.argmax(1).tolist() == [0, 2, 3]
    assert math.isclose(float(found[1, 1] / found[1, 2]), math.exp(-2), rel_tol=1e-5)
    gaze = ratings.gaze_of(BOX, (32, 32))[0]
    assert gaze.min() == 0 and gaze.max() == 1
    row, column = divmod(int(gaze.argmax()), 32)
    assert row in (13, 14) and column in (11, 12)  # the four pixels of the middle are alike


def test_without_a_temperature_scores_stay_between_two_and_four():
    head = dpa.Prototypes(6)
    with torch.no_grad():
        head.prototypes.copy_(torch.cat([torch.eye(1, 6), -torch.eye(1, 6).repeat(4, 1)]))
        seen = {}
        for tau in (1.0, 0.05):
            head.log_tau.fill_(math.log(tau))
            seen[tau] = float(scores.expected(head(torch.eye(1, 6))))
    assert abs(seen[1.0] - 1.88) < 0.005 and seen[0.05] < 1.001


def test_rollout_is_the_product_of_the_blocks():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.rand(2, 1, 2, 5, 5, generator=generator).softmax(-1)
    a, b = ((each.mean(1)[0] + torch.eye(5)) / 2 for each in (first, second))
    want = (b @ a)[0, 1:].view(2, 2)  # the second block reads what the first one wrote
    want = (want - want.min()) / (want.max() - want.min())
    assert torch.allclose(scores.rollout((first, second), (2, 2))[0], want, atol=1e-6)


@pytest.fixture(scope="module")
def rated():
    return ratings.draw(pictures(256), 1)


@pytest.fixture(scope="module")
def assessor(rated):
    """Small, and taught a little."""
    model = dpa.build(24, 8, 32, 1)
    return dpa.train(rated.images, rated.ratings, rated.gaze, model=model, epochs=20, lr=2e-3,
                     progress=False)  # fmt: skip


def test_the_attentive_prior_moves_the_map_to_the_patch(rated, assessor):
    blind = dpa.train(rated.images, rated.ratings, rated.gaze, model=dpa.build(24, 8, 32, 1),
                      epochs=20, lr=2e-3, attentive=0, progress=False)  # fmt: skip
    test = ratings.draw(pictures(64, seed=5), 2)
    alike = [
        float(map_correlation(scores.attention(one, test.images).detach(), test.gaze).mean())
        for one in (assessor, blind)
    ]
    assert alike[0] > alike[1] + 0.1
    with torch.no_grad():
        learned = scores.score(assessor, rated.images)  # of so few, little is true of others
    assert spearman(learned.numpy(), rated.truth.numpy()) > 0.3


def test_the_backbone_is_quantized_and_the_prototypes_are_not(rated, assessor):
    qmodel = qtk.quantize(assessor, w=8, a=8, preset="fast", progress=False,
                          calib=[{"pixel_values": rated.images[:64] * 2 - 1}])  # fmt: skip
    assert type(qmodel) is dpa.Assessor
    assert torch.equal(qmodel.classifier.prototypes, assessor.classifier.prototypes)
    found = assess(assessor, qmodel, rated.images, rated.truth, rated.gaze, second=assessor)
    figures = {figure.name: figure for figure in found.figures}
    assert list(figures) == ["SROCC", "PLCC", "RMSE", "map and gaze"] and found.agreement > 0.99
    assert all(f.low <= f.difference <= f.high for f in found.figures)
    assert all(f.floor == abs(f.difference) for f in found.figures)  # the second is the float one
    json.dumps(found.to_dict(), allow_nan=False)
    assert "SROCC" in found.table() and "| SROCC |" in found.markdown()
    with torch.no_grad():
        found = scores.score(qmodel, rated.images)
    assert (found - scores.score(assessor, rated.images).detach()).abs().mean() < 0.1


def test_ranks_share_ties_and_spearman_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 8, (2, 40)).astype(float)
    assert ranks(np.array([2.0, 5, 2, 1])).tolist() == [1.5, 3, 1.5, 0]
    assert math.isclose(spearman(a, b), stats.spearmanr(a, b).statistic, rel_tol=1e-9)


def test_a_hypervolume_is_the_area_that_some_point_reaches():
    rng = np.random.default_rng(0)
    success, scores = rng.random((3, 5)), 1 + 4 * rng.random((3, 5))
    at = (np.arange(400) + 0.5) / 400
    for k, volume in enumerate(hypervolume(success, scores)):
        reached = (success[k][:, None, None] > at[:, None]) & (
            (scores[k] - 1)[:, None, None] > 4 * at
        )
        assert abs(float(reached.any(0).mean()) - volume) < 5 / 400


def test_pictures_are_what_a_reader_of_png_sees():
    image = pytest.importorskip("PIL.Image")
    made = picture.sheet([torch.rand(2, 3, 4, 5), torch.rand(1, 3, 4, 5)], 2)
    assert made.shape == (3, 2 * (8 + 4), 2 * (10 + 4))
    seen = np.asarray(image.open(io.BytesIO(picture.png(made))))
    assert (seen == (made * 255).round().byte().permute(1, 2, 0).numpy()).all()
    assert (seen[-8:, -12:] == 255).all()  # nothing there: white


def test_corners_are_those_that_pasting_draws():
    x, own = torch.zeros(10, 3, 12, 12), torch.ones(3, 4, 4)
    shown = square.paste(own, x, torch.Generator().manual_seed(4))
    corners = square.corners(x, 4, torch.Generator().manual_seed(4))
    for image, (left, top) in zip(shown, corners.tolist(), strict=True):
        assert image.sum() == 48 and (image[:, top : top + 4, left : left + 4] == 1).all()


@pytest.fixture(scope="module")
def victims():
    """model, qmodel, (pixels, labels) that the float one has right."""
    from qtk.models import vit

    torch.manual_seed(0)
    model, _ = vit.tiny()
    pixels = (pictures(48, 16) * 255).round() / 255
    calib = [{"pixel_values": 2 * pixels - 1}]
    qmodel = qtk.quantize(model, w=4, a=4, calib=calib, preset="fast", progress=False)
    with torch.no_grad():
        labels = model(pixel_values=2 * pixels - 1).logits.argmax(-1)
    return model, qmodel, (pixels, labels)


def told(**more):
    half = ((0.5,) * 3, (0.5,) * 3)
    return {"normalize": half, "side": 6, "steps": 12, "progress": False, **more}


def test_patches_look_more_natural_where_that_weighs_more(victims, tmp_path):
    model, qmodel, data = victims
    craft, test = ((part[:24], data[1][:24]) for part in (data[0], data[0]))
    judges = dpa.build(16, 4, 32, 1, seed=1), dpa.build(16, 4, 32, 1, seed=2)
    given = told(weights=(0, 100), resume=tmp_path / "kept")
    found = qtk.naturalness(model, qmodel, craft, test, *judges, **given)
    points = {(point.crafted, point.weight): point for point in found.points}
    assert list(points) == [*((name, 0) for name in CONTROLS), ("float", 0), ("float", 100),
                            ("quantized", 0), ("quantized", 100)]  # fmt: skip
    for crafted in ("float", "quantized"):
        assert points[crafted, 100].assessor > points[crafted, 0].assessor
    assert points["float", 0].right == 24  # labels are the float model's answers
    assert len(found.fronts) == 8 and len(found.differences) == 4
    assert all(0 <= f.low <= f.volume <= f.high <= 1 for f in found.fronts)
    assert set(found.pareto) == {f"{a} on {b}" for a in ("float", "quantized")
                                 for b in ("float", "quantized")}  # fmt: skip
    again = qtk.naturalness(model, qmodel, craft, test, *judges, **given)
    assert len(list((tmp_path / "kept").iterdir())) == 4 and again.points == found.points
    json.dumps(found.to_dict(), allow_nan=False)
    found.contact_sheet(tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").read_bytes()[1:4] == b"PNG"
    assert "data:image/png" in found.html() and "hypervolume" in found.table()
    assert "| mean colour |" in found.markdown()


def test_what_cannot_be_judged_says_why(victims, rated, assessor):
    model, qmodel, data = victims
    one, two = dpa.build(16, 4, 32, 1, seed=1), dpa.build(16, 4, 32, 1, seed=2)
    with pytest.raises(SchemeError, match="another seed"):
        qtk.naturalness(model, qmodel, data, data, one, one, **told())
    with pytest.raises(SchemeError, match="none below zero"):
        qtk.naturalness(model, qmodel, data, data, one, two, **told(weights=(-1,)))
    with pytest.raises(SchemeError, match="patch of 16 pixels"):
        qtk.naturalness(model, qmodel, data, data, one, two, **told(side=16))
    with pytest.raises(CalibrationError, match="their labels"):
        wrong = data[0], (data[1] + 1) % model.config.num_labels
        qtk.naturalness(model, model, data, wrong, one, two, **told())
    with pytest.raises(ModelError, match="ratings 1 to 5"):
        scores.score(torch.nn.Flatten(), data[0])
    with pytest.raises(CalibrationError, match="do not fit"):
        dpa.train(rated.images, rated.ratings[:, :4], rated.gaze)
    with pytest.raises(CalibrationError, match="add up to 1"):
        dpa.train(rated.images, rated.ratings * 2, rated.gaze)
    with pytest.raises(SchemeError, match="not negative"):
        dpa.train(rated.images, rated.ratings, rated.gaze, attentive=-1)
    with pytest.raises(CalibrationError, match="24 pixels"):
        ratings.draw(torch.rand(4, 3, 16, 16))
    with pytest.raises(CalibrationError, match="in \\[0, 1\\]"):
        ratings.draw(2 * torch.rand(4, 3, 24, 24) - 1)
    with pytest.raises(CalibrationError, match="three or more"):
        assess(assessor, assessor, rated.images[:2], rated.truth[:2])
