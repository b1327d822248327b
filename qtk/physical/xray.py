"""X-Adv: metal objects that hide what a bag holds, and whether they still do so after rounding.

USENIX Security 2023, github.com/DIG-Beihang/X-adv; here against a classifier of
bags. The objects' shapes are learned on scenes of their own, Adam on vertices for a loss of

    - CE(model(scene), label) + beta TV,

and are then pasted onto other scenes. Places are looked for in each scene, with unshaped balls, for
the model that is attacked; what is shaped lies where the balls lay, so that the difference is the
shape's.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qtk import intervals
from qtk.errors import CalibrationError, SchemeError
from qtk.fidelity.compare import class_logits
from qtk.physical import place
from qtk.physical.colour import colour, material_of
from qtk.physical.mesh import Mesh, ball
from qtk.physical.scene import Scenes
from qtk.physical.thickness import thickness
from qtk.pipeline.progress import progress_bar
from qtk.report import page
from qtk.table import finite, markdown, ruled

LR = 0.01
BETA = 0.1
BATCH = 32
HEAD = ["scenes", "crafted on", "float", "95 %", "quantized", "95 %", "p", "item hidden"]


@dataclass(frozen=True)
class Row:
    """One kind of scene.

    Attributes:
        name: "clean", "balls, random places", "discs", "balls" or "shaped"; `crafted` on "float",
            "quantized" or "-".
        correct: of the float model, and `correct_quantized`; of `samples`.
        p: of McNemar's exact test that as many scenes become wrong by rounding as right.
        hidden: mean share of the item's box that objects cover.
    """

    name: str
    crafted: str
    samples: int
    correct: int
    correct_quantized: int
    p: float
    hidden: float


@dataclass(frozen=True)
class XRay:
    """What objects do to both models.

    Attributes:
        shapes: vertices [objects, V, 3] by the model they were crafted on.
    """

    rows: tuple[Row, ...]
    shapes: dict[str, Tensor]
    faces: Tensor
    material: str
    seed: int
    seconds: float
    gradients: str = "straight-through"

    def drop(self, name: str, crafted: str, model: str) -> float:
        """How much accuracy scenes of one kind cost a model, "float" or "quantized"."""
        rows = {(row.name, row.crafted): row for row in self.rows}
        own, clean = rows[name, crafted], rows["clean", "-"]
        field = "correct" if model == "float" else "correct_quantized"
        return float((getattr(clean, field) - getattr(own, field)) / own.samples)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, shapes as lists."""
        rows = [asdict(row) for row in self.rows]
        shapes = {name: shape.tolist() for name, shape in self.shapes.items()}
        return finite({"rows": rows, "shapes": shapes, "material": self.material,
                       "seed": self.seed, "seconds": self.seconds,
                       "gradients": self.gradients})  # fmt: skip

    def table(self) -> str:
        """Plain text, a line a kind of scene."""
        return "\n".join([*ruled(HEAD, self._cells()), "", *self._remarks()])

    def markdown(self) -> str:
        """The same in Markdown."""
        remarks = (f"{remark}\n" for remark in self._remarks())
        return "\n".join([*markdown(HEAD, self._cells()), "", *remarks])

    def section(self) -> str:
        """The same as a section of a page (`qtk.report.page`)."""
        remarks = map(page.paragraph, self._remarks())
        return page.section("Objects in X-ray images", page.table(HEAD, self._cells()), *remarks)

    def write_html(self, file: str | Path) -> None:
        """Writes one page, whole or not at all."""
        lead = f"{self.rows[0].samples} scenes, objects of {self.material}, seed {self.seed}"
        page.write(file, page.page("Objects in X-ray images", lead, [self.section()]))

    def _cells(self) -> list[list[str]]:
        return [
            [row.name, row.crafted, *_share(row.correct, row.samples),
             *_share(row.correct_quantized, row.samples), f"{row.p:.3g}",
             f"{100 * row.hidden:.1f} %"]
            for row in self.rows
        ]  # fmt: skip

    def _remarks(self) -> list[str]:
        found = ["accuracy in %; gradients straight-through, scored without"]
        for crafted, other in (("float", "quantized"), ("quantized", "float")):
            own = self.drop("shaped", crafted, crafted)
            there = self.drop("shaped", crafted, other)
            kept = f"{100 * there / own:.0f} %" if own > 0 else "nothing there was"
            found.append(
                f"of what shapes crafted on the {crafted} model cost it, {kept} remains on the "
                f"{other} one"
            )
        return found


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
        seed: of random places and of the order of scenes.
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
    balls = mesh.vertices[None].repeat(objects, 1, 1)
    plain = render(balls, mesh.faces, patch, material)
    disc = torch.where(plain < 1, 0.0, 1.0)  # opaque: what hiding alone does
    rings = _rings(test, patch)
    generator = torch.Generator().manual_seed(seed)
    anywhere = place.random(rings, objects, generator)
    rows = [_row("clean", "-", models, test, test.images, 0.0)]
    rows.append(_pasted("balls, random places", "-", models, test, plain, anywhere))
    shapes = {}
    with progress_bar(progress) as bar:
        for done, (name, own) in enumerate(models.items()):
            bar.show(f"objects, {name}", done, len(models))
            learned_at = place.greedy(craft.images, plain, _rings(craft, patch), _loss(own, craft))
            shapes[name] = shape(
                own, craft, learned_at, mesh, objects, patch, material, steps, seed
            )
            places = place.greedy(test.images, plain, rings, _loss(own, test))
            shaped = render(shapes[name], mesh.faces, patch, material)
            for title, patches in (("discs", disc), ("balls", plain), ("shaped", shaped)):
                rows.append(_pasted(title, name, models, test, patches, places))
    return XRay(tuple(rows), shapes, mesh.faces, material, seed, time.perf_counter() - start)


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
) -> Row:  # fmt: skip
    seen = (_paste_all(scenes.images, patches, places) * 255).round() / 255
    covered = [
        sum(float(place.hidden(box, own[None], patches.shape[-1])) for own in corners)
        for box, corners in zip(scenes.boxes, places, strict=True)
    ]
    return _row(name, crafted, models, scenes, seen, sum(covered) / len(covered))


@torch.no_grad()
def _row(
    name: str, crafted: str, models: dict[str, nn.Module], scenes: Scenes, images: Tensor,
    hidden: float,
) -> Row:  # fmt: skip
    right = [
        torch.cat([_logits(own, part).argmax(1) for part in images.split(256)]) == scenes.labels
        for own in models.values()
    ]
    p = intervals.mcnemar(int((right[0] & ~right[1]).sum()), int((~right[0] & right[1]).sum()))
    counts = [int(each.sum()) for each in right]
    return Row(name, crafted, len(scenes.labels), counts[0], counts[1], p, hidden)


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    return class_logits(
        model, model(images), "objects are crafted against a ViTForImageClassification"
    )


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


def _share(hits: int, samples: int) -> Sequence[str]:
    low, high = intervals.wilson(hits, samples)
    return f"{100 * hits / samples:.1f}", f"{100 * low:.1f} to {100 * high:.1f}"
