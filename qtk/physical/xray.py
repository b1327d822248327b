"""qtk.xray: metal objects that hide what a bag holds (X-Adv), and whether rounding changes that.

USENIX Security 2023, github.com/DIG-Beihang/X-adv; here against a classifier of
bags. The objects' shapes are learned on scenes of their own, Adam on vertices for a loss of

    - CE(model(scene), label) + beta TV,

and are then pasted onto other scenes. Places are looked for in each scene, with unshaped balls, for
the model that is attacked; what is shaped lies where the balls lay, so that the difference is the
shape's.
"""

import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qtk.errors import CalibrationError, SchemeError
from qtk.fidelity.compare import class_logits
from qtk.integrity import checksum, fingerprint
from qtk.physical import place
from qtk.physical.colour import colour, material_of
from qtk.physical.exposure import Exposed, XRay, exposure
from qtk.physical.kept import Kept
from qtk.physical.mesh import Mesh, ball
from qtk.physical.scene import Scenes
from qtk.physical.thickness import thickness
from qtk.pipeline.progress import progress_bar

LR = 0.01
BETA = 0.1
BATCH = 32
SHOWN = 8  # scenes of a line of the contact sheet


def xray(
    model: nn.Module,
    qmodel: nn.Module,
    craft: Scenes,
    test: Scenes,
    *,
    objects: int = 2,
    patch: int = 10,
    material: str = "iron",
    steps: int = 24,
    mesh: Mesh | None = None,
    resume: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> XRay:
    """Crafts objects on each model and scores them on both.

    Args:
        model: a classifier of images in floating point; `qmodel` quantized from it.
        craft: scenes that shapes are learned on; `test` others.
        objects: in a scene; patch: pixels of the square that each is seen in.
        material: a name of `qtk.physical.colour.MATERIALS`.
        steps: of Adam, each on one batch of 32 scenes.
        mesh: what every object begins as; None is a ball of 26 vertices.
        resume: a folder that keeps finished shapes and places, and is gone on from.
        seed: of random places, of the order of scenes and of the bootstrap.
        progress: shows a bar.

    Raises:
        ModelError: a model without a classifier head.
        CalibrationError: no scenes, or a patch larger than they are.
        SchemeError: no such material, or no object.
    """
    start = time.perf_counter()
    material_of(material)
    _check(model, qmodel, craft, test, objects, patch, steps)
    mesh = mesh or ball()
    models = {"float": model.eval(), "quantized": qmodel.eval()}
    plain = render(mesh.vertices[None].repeat(objects, 1, 1), mesh.faces, patch, material)
    disc = torch.where(plain < 1, 0.0, 1.0)  # opaque: what hiding alone does
    anywhere = place.random(_rings(test, patch), objects, torch.Generator().manual_seed(seed))
    settings = [objects, patch, material, steps, seed, checksum(mesh.vertices)]
    kept = Kept(resume, settings, [checksum(each) for s in (craft, test) for each in s.parts()])
    rows = [_exposed("clean", "-", models, test, test.images, 0.0)]
    rows.append(_pasted("balls, random places", "-", models, test, plain, anywhere))
    shapes, attacked = {}, []
    with progress_bar(progress) as bar:
        for done, (name, own) in enumerate(models.items()):
            bar.show(f"objects, {name}", done, len(models))
            make = partial(_crafted, own, craft, test, mesh, plain, material, steps, seed)
            found = kept.get(fingerprint(own), make)
            shapes[name], places = found["vertices"], found["places"]
            shaped = render(shapes[name], mesh.faces, patch, material)
            for title, patches in (("discs", disc), ("balls", plain), ("shaped", shaped)):
                rows.append(_pasted(title, name, models, test, patches, places))
            attacked += _pictures(test.part(0, SHOWN), shapes[name], mesh, shaped, places[:SHOWN])
    return exposure(
        rows, shapes, mesh.faces, torch.stack([test.images[:SHOWN], *attacked]), material, seed,
        time.perf_counter() - start,
    )  # fmt: skip


def _crafted(
    model: nn.Module, craft: Scenes, test: Scenes, mesh: Mesh, plain: Tensor, material: str,
    steps: int, seed: int,
) -> dict[str, Tensor]:  # fmt: skip
    """Shapes learned where balls hurt most in `craft`, and where they do so in `test`."""
    patch = plain.shape[-1]
    learned_at = place.greedy(craft.images, plain, _rings(craft, patch), _loss(model, craft))
    vertices = shape(model, craft, learned_at, mesh, len(plain), patch, material, steps, seed)
    places = place.greedy(test.images, plain, _rings(test, patch), _loss(model, test))
    return {"vertices": vertices, "places": places}


def _pictures(
    scenes: Scenes, vertices: Tensor, mesh: Mesh, shaped: Tensor, places: Tensor
) -> list[Tensor]:
    """How thick the objects are, dark where they are, and the scenes with them."""
    depths = [thickness(own, mesh.faces, shaped.shape[-1]) for own in vertices]
    maps = torch.stack([(1 - depth).expand(3, -1, -1) for depth in depths])
    blank = torch.ones_like(scenes.images)
    return [_paste_all(blank, maps, places), _paste_all(scenes.images, shaped, places)]


def render(vertices: Tensor, faces: Tensor, patch: int, material: str) -> Tensor:
    """[objects, V, 3] -> what they let through, [objects, 3, p, p]."""
    seen = [thickness(own, faces, patch) for own in vertices]
    return torch.stack([colour(each, material).permute(2, 0, 1) for each in seen])


def shape(
    model: nn.Module, scenes: Scenes, places: Tensor, mesh: Mesh, objects: int, patch: int,
    material: str, steps: int, seed: int,
) -> Tensor:  # fmt: skip
    """Vertices [objects, V, 3] in [0, 1] after `steps` of Adam, shared by all scenes."""
    free = mesh.vertices[None].repeat(objects, 1, 1).requires_grad_()
    optimizer = torch.optim.Adam([free], LR)
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([
        torch.randperm(len(scenes.labels), generator=generator)
        for _ in range(1 + steps * BATCH // len(scenes.labels))
    ])  # fmt: skip
    with torch.enable_grad():
        for step in range(steps):
            chosen = order[step * BATCH : (step + 1) * BATCH]
            inside = free + (free.clamp(0, 1) - free).detach()  # a clamped vertex can come back
            patches = render(inside, mesh.faces, patch, material)
            images = _paste_all(scenes.images[chosen], patches, places[chosen])
            loss = -F.cross_entropy(_logits(model, images), scenes.labels[chosen])
            smooth = torch.stack([mesh.variation(own) for own in free]).mean()
            (slope,) = torch.autograd.grad(loss + BETA * smooth, free)
            free.grad = slope.nan_to_num(0, 0, 0)
            optimizer.step()
    return free.detach().clamp(0, 1)


def _paste_all(images: Tensor, patches: Tensor, places: Tensor) -> Tensor:
    for number, patch in enumerate(patches):
        images = place.paste(images, patch, places[:, number])
    return images


def _rings(scenes: Scenes, patch: int) -> Tensor:
    size = scenes.images.shape[-1]
    return torch.stack([place.ring(box, patch, size) for box in scenes.boxes])


def _loss(model: nn.Module, scenes: Scenes) -> place.Loss:
    @torch.no_grad()
    def loss(images: Tensor, number: int) -> Tensor:
        labels = scenes.labels[number].expand(len(images))
        return F.cross_entropy(_logits(model, images), labels, reduction="none")

    return loss


def _pasted(
    name: str, crafted: str, models: dict[str, nn.Module], scenes: Scenes, patches: Tensor,
    places: Tensor,
) -> Exposed:  # fmt: skip
    seen = (_paste_all(scenes.images, patches, places) * 255).round() / 255
    covered = [
        sum(float(place.hidden(box, own[None], patches.shape[-1])) for own in corners)
        for box, corners in zip(scenes.boxes, places, strict=True)
    ]
    return _exposed(name, crafted, models, scenes, seen, sum(covered) / len(covered))


@torch.no_grad()
def _exposed(
    name: str, crafted: str, models: dict[str, nn.Module], scenes: Scenes, images: Tensor,
    hidden: float,
) -> Exposed:  # fmt: skip
    right = [
        torch.cat([_logits(own, part).argmax(1) for part in images.split(256)]) == scenes.labels
        for own in models.values()
    ]
    return Exposed(name, crafted, np.stack([each.numpy() for each in right]), hidden)


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    return class_logits(model, model(images), "objects are crafted against a classifier of images")


def _check(
    model: nn.Module, qmodel: nn.Module, craft: Scenes, test: Scenes, objects: int, patch: int,
    steps: int,
) -> None:  # fmt: skip
    if objects < 1 or steps < 1:
        raise SchemeError(f"{objects} objects and {steps} steps: give one at least")
    for scenes in (craft, test):
        if not len(scenes.labels) or not 2 <= patch <= scenes.images.shape[-1]:
            raise CalibrationError(
                f"{len(scenes.labels)} scenes of {list(scenes.images.shape[1:])} and a patch of "
                f"{patch} pixels: give scenes, and a patch that fits into them"
            )
    for own in (model, qmodel):
        with torch.no_grad():
            classes = _logits(own, test.images[:1]).shape[1]
        if int(test.labels.max()) >= classes:
            raise CalibrationError(
                f"label {int(test.labels.max())}, but the model has {classes} classes"
            )
