"""The renderer against geometry, placement against trying all, and the attack's bookkeeping."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import qtk
from qtk.cli import app
from qtk.errors import CalibrationError, ModelError, SchemeError
from qtk.physical import place, xray
from qtk.physical.colour import MATERIALS, colour, transmission
from qtk.physical.mesh import RADIUS, Mesh, ball
from qtk.physical.scene import NAMES, draw
from qtk.physical.thickness import thickness


def test_the_ball_has_the_published_size_and_is_closed():
    mesh = ball()
    assert mesh.vertices.shape == (26, 3) and mesh.faces.shape == (48, 3)
    a, b, c = mesh.vertices[mesh.faces].unbind(1)
    normal = torch.linalg.cross(b - a, c - a)
    assert ((normal * ((a + b + c) / 3 - 0.5)).sum(1) > 0).all()  # all faces look outward
    volume = float((a * torch.linalg.cross(b, c)).sum()) / 6
    assert 0.7 < volume / (4 / 3 * math.pi * RADIUS**3) < 1


def test_a_ball_is_as_thick_as_its_chords():
    size, mesh = 40, ball(16, 20)
    assert len(mesh.faces) >= 500
    found = thickness(mesh.vertices, mesh.faces, size)
    centres = (torch.arange(size) + 0.5) / size - 0.5
    distance2 = centres[:, None].square() + centres.square()
    chord = 2 * (RADIUS**2 - distance2).clamp(min=0).sqrt()
    inner = distance2 < (0.9 * RADIUS) ** 2
    assert (found - chord)[inner].abs().max() < 0.05 * 2 * RADIUS
    assert (found[distance2 > RADIUS**2] == 0).all()


def test_thickness_is_of_all_rows_and_columns_where_it_should_be():
    """A tent over x in [0, .5]: rows are y, columns are x."""
    low, high = 0.2, 0.7
    corners = [[x, y, z] for z in (low, high) for y in (0.0, 1.0) for x in (0.0, 0.5)]
    faces = [[0, 2, 3], [0, 3, 1], [4, 5, 7], [4, 7, 6], [0, 1, 5], [0, 5, 4], [2, 6, 7], [2, 7, 3],
             [0, 4, 6], [0, 6, 2], [1, 3, 7], [1, 7, 5]]  # fmt: skip
    slab = Mesh(torch.tensor(corners), torch.tensor(faces))
    found = thickness(slab.vertices, slab.faces, 8)
    assert torch.allclose(found[:, :4], torch.tensor(high - low)) and (found[:, 4:] == 0).all()


def test_gradients_are_those_of_finite_differences():
    """Of depths, and of x and y: pixels that a silhouette crosses are left out."""
    generator = torch.Generator().manual_seed(0)
    mesh = ball()
    start = mesh.vertices.double() + 0.01 * torch.randn(26, 3, generator=generator).double()
    weight = torch.rand(20, 20, generator=generator).double()
    step = 1e-6
    vertices = start.clone().requires_grad_()
    weight = weight * (thickness(start, mesh.faces, 20) > 0.3)  # away from the silhouette
    (found,) = torch.autograd.grad((weight * thickness(vertices, mesh.faces, 20)).sum(), vertices)
    for v, axis in ((0, 2), (3, 2), (9, 0), (14, 1), (25, 2)):
        values = []
        for sign in (1, -1):
            moved = start.clone()
            moved[v, axis] += sign * step
            values.append((weight * thickness(moved, mesh.faces, 20)).sum())
        numeric = float(values[0] - values[1]) / (2 * step)
        assert abs(float(found[v, axis]) - numeric) <= 1e-3 * max(abs(numeric), 1e-3)


def test_a_degenerate_triangle_gives_no_nan():
    mesh = ball()
    flat = mesh.vertices.clone()
    flat[:, 0] = 0.5  # all of it in one plane along the rays
    flat.requires_grad_()
    total = thickness(flat, mesh.faces, 10).sum()
    (slope,) = torch.autograd.grad(total, flat)
    assert slope.isfinite().all()


@pytest.mark.parametrize("material, at, want", [
    ("iron", 0.05, (0.56, 0.78, 0.98)), ("iron", 0.5, (0.10, 0.51, 0.88)),
    ("aluminium", 0.25, (0.77, 0.87, 0.67)), ("plastic", 1.0, (0.97, 0.67, 0.33)),
])  # fmt: skip
def test_colours_are_the_fitted_ones(material, at, want):
    found = colour(torch.tensor(at), material)
    assert (found - torch.tensor(want)).abs().max() <= 0.0051  # two decimals are given


def test_nothing_is_white_in_both_forms():
    nothing = torch.zeros(2, 2)
    for name in MATERIALS:
        assert (colour(nothing, name) == 1).all()
        assert torch.allclose(transmission({name: nothing}), torch.ones(2, 2, 3))


def test_stacked_slabs_are_one_slab_of_their_sum():
    """Exactly so at one energy, where transmission is an exponential: the ratio does not matter."""
    a, b = torch.rand(2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    together = transmission({"iron": a + b})
    split = transmission({"iron": a, "aluminium": 0 * b})
    assert torch.allclose(transmission({"iron": a, "aluminium": b}),
                          transmission({"aluminium": b, "iron": a}))  # fmt: skip
    assert torch.allclose(split, transmission({"iron": a}))
    # two energies are each an exponential: solving the 3 x 2 spectrum gives them back
    spectrum = torch.linalg.pinv(torch.tensor([(0.8, 0.2), (0.5, 0.5), (0.2, 0.8)]).double())
    energies = [transmission({"iron": each}) @ spectrum.T for each in (a, b, a + b)]
    assert (energies[0] * energies[1] - energies[2]).abs().max() < 1e-6
    assert ((together > 0) & (together <= 1)).all()
    fitted = colour(a, "iron") * colour(b, "iron") - colour(a + b, "iron")
    assert fitted.abs().max() > 0.05  # the curves are not Beer-Lambert


def test_scenes_repeat_themselves_and_hold_their_item_in_the_box():
    scenes, again = draw(20, 3), draw(20, 3)
    assert torch.equal(scenes.images, again.images)
    assert scenes.images.shape == (20, 3, 64, 64)
    assert torch.equal((scenes.images * 255).round() / 255, scenes.images)
    assert set(scenes.labels.tolist()) <= set(range(len(NAMES)))
    left, top, right, bottom = scenes.boxes.T
    assert (left < right).all() and (top < bottom).all() and int(scenes.boxes.max()) <= 64


def test_patches_multiply_where_they_lie():
    images, patch = torch.full((2, 3, 6, 6), 0.5), torch.full((3, 2, 2), 0.4)
    found = place.paste(images, patch, torch.tensor([[1, 3], [4, 0]]))
    want = images.clone()
    want[0, :, 3:5, 1:3] *= 0.4
    want[1, :, 0:2, 4:6] *= 0.4
    assert torch.equal(found, want)


def test_rings_leave_the_item_free():
    for box in draw(30, 1).boxes:
        corners = place.ring(box, 10, 64)
        assert corners.shape == (50, 2) and corners.min() >= 0 and corners.max() <= 54
        assert (place.hidden(box, corners, 10) <= 0.25).all()


def test_greedy_is_exhaustive_for_one_object_and_no_worse_than_chance():
    scenes = draw(6, 2)
    rings = torch.stack([place.ring(box, 10, 64) for box in scenes.boxes])
    target = torch.rand(64, 64, generator=torch.Generator().manual_seed(0))

    def loss(images, number):
        return -(images.mean(1) * target).sum((1, 2))

    patches = torch.full((1, 3, 10, 10), 0.2)
    chosen = place.greedy(scenes.images, patches, rings, loss)
    drawn = place.random(rings, 1, torch.Generator().manual_seed(0))
    for i in range(6):
        image = scenes.images[i : i + 1]
        values = [float(loss(place.paste(image, patches[0], at[None]), i)) for at in rings[i]]
        value = float(loss(place.paste(image, patches[0], chosen[i]), i))
        assert value == max(values) >= float(loss(place.paste(image, patches[0], drawn[i]), i))


class Brightness(nn.Module):
    """Class 1 where the bag is bright: metal lowers it."""

    def __init__(self, limit=0.75):
        super().__init__()
        self.limit = limit

    def forward(self, images):
        margin = 40 * (images.mean((1, 2, 3)) - self.limit)
        return torch.stack([-margin, margin, *[margin * 0 - 99] * 3], 1)


def bright(n, seed):
    scenes = draw(n, seed)
    labels = Brightness()(scenes.images).argmax(1)
    return type(scenes)(scenes.images, labels, scenes.boxes)


def test_objects_that_are_shaped_darken_a_model_that_likes_light(tmp_path):
    craft, test = bright(24, 5), bright(40, 6)
    model = Brightness()
    before = xray.render(ball().vertices[None], ball().faces, 10, "iron")
    found = xray.xray(model, model, craft, test, objects=2, steps=6, progress=False)
    rows = {(row.name, row.crafted): row for row in found.rows}
    assert len(rows) == 8 and rows["clean", "-"].correct == 40
    for row in found.rows:
        assert row.correct == row.correct_quantized and row.p == 1
        assert row.hidden <= 2 * (1 - place.FREE)
    assert rows["discs", "float"].correct <= rows["balls", "float"].correct
    shape = found.shapes["float"]
    assert shape.shape == (2, 26, 3) and shape.min() >= 0 and shape.max() <= 1
    assert not torch.equal(shape[0], ball().vertices) and before.shape == (1, 3, 10, 10)
    json.dumps(found.to_dict(), allow_nan=False)
    assert "| shaped | float |" in found.markdown() and "placement" in found.table()


def test_what_was_found_is_kept_and_pictured(tmp_path):
    craft, test, model = bright(24, 5), bright(12, 6), Brightness()
    model.register_buffer("one", torch.ones(1))
    given = {"steps": 3, "progress": False, "resume": tmp_path / "kept"}
    first = xray.xray(model, model, craft, test, **given)
    assert len(list((tmp_path / "kept").iterdir())) == 1  # both models are one
    again = xray.xray(model, model, craft, test, **given)
    assert again.rows == first.rows and again.table() == first.table()
    clean, thick, attacked = first.pictures[:3]
    assert torch.equal(clean, test.images[:8]) and torch.equal(thick, first.pictures[3])
    assert ((attacked < clean - 1e-3).any(1) <= (thick < 1).any(1)).all()  # dark where it is thick
    xray.xray(model, model, craft, test, seed=1, **given)
    assert len(list((tmp_path / "kept").iterdir())) == 2


def test_the_command_line_draws_scenes_or_reads_them(tmp_path):
    from qtk.physical import classifier

    model = classifier.train(classifier.vit(16, 32, 1), draw(16, 9), epochs=1, progress=False)
    model.save_pretrained(tmp_path / "float")
    calib = [{"pixel_values": draw(16, 9).images}]
    qtk.quantize(model, w=4, a=8, calib=calib, preset="fast", progress=False).save_pretrained(
        tmp_path / "quantized"
    )
    draw(20, 4).save(tmp_path / "scenes.safetensors")
    folders = [f"{tmp_path / name}" for name in ("float", "quantized")]
    small = ["--objects", "1", "--steps", "1", "--json"]
    page, sheet = tmp_path / "page.html", tmp_path / "sheet.png"
    drawn = CliRunner().invoke(app, [
        "xray", *folders, *small, "--craft", "4", "--test", "6", "--html", f"{page}",
        "--pictures", f"{sheet}",
    ])  # fmt: skip
    assert drawn.exit_code == 0, drawn.output
    assert {row["samples"] for row in json.loads(drawn.stdout)["rows"]} == {6}
    assert "data:image/png" in page.read_text() and sheet.read_bytes()[1:4] == b"PNG"
    held = CliRunner().invoke(
        app, ["xray", *folders, *small, "--scenes", f"{tmp_path / 'scenes.safetensors'}"]
    )
    assert {row["samples"] for row in json.loads(held.stdout)["rows"]} == {10}
    wrong = CliRunner().invoke(app, ["xray", *folders, "--scenes", f"{page}"])
    assert wrong.exit_code == 1 and "cannot be read" in wrong.output


def test_shaping_raises_the_loss_it_is_for():
    craft = bright(32, 5)
    mesh, model = ball(), Brightness()
    places = place.random(torch.stack([place.ring(b, 10, 64) for b in craft.boxes]), 1,
                          torch.Generator().manual_seed(0))  # fmt: skip
    keep = craft.labels == 1
    craft = type(craft)(craft.images[keep], craft.labels[keep], craft.boxes[keep])
    made = xray.shape(model, craft, places[keep], mesh, 1, 10, "iron", 8, 0)

    def loss(vertices):
        patches = xray.render(vertices, mesh.faces, 10, "iron")
        logits = model(xray._paste_all(craft.images, patches, places[keep]))
        return float(nn.functional.cross_entropy(logits, craft.labels))

    assert loss(made) > loss(mesh.vertices[None])


def test_what_cannot_be_attacked_says_why():
    scenes, model = bright(4, 0), Brightness()
    mesh = ball()
    with pytest.raises(CalibrationError, match="not watertight"):
        Mesh(mesh.vertices, mesh.faces[1:])
    with pytest.raises(CalibrationError, match="beyond the 26"):
        Mesh(mesh.vertices, mesh.faces + 1)
    with pytest.raises(SchemeError, match="no material 'gold'"):
        xray.xray(model, model, scenes, scenes, material="gold")
    with pytest.raises(SchemeError, match="0 objects"):
        xray.xray(model, model, scenes, scenes, objects=0)
    with pytest.raises(CalibrationError, match="patch of 65"):
        xray.xray(model, model, scenes, scenes, patch=65)
    with pytest.raises(ModelError, match="no classifier head"):
        xray.xray(nn.Flatten(2), model, scenes, scenes)
    late = type(scenes)(scenes.images, scenes.labels + 5, scenes.boxes)
    with pytest.raises(CalibrationError, match="5 classes"):
        xray.xray(model, model, scenes, late)
    assert np.isfinite(scenes.images.numpy()).all()
