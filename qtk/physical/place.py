"""Where objects lie: on a ring around the item, found one after the other."""

from collections.abc import Callable

import torch
from torch import Tensor

ACTIONS = 50
FREE = 0.75  # of the item's box that an object must leave free

Loss = Callable[[Tensor, int], Tensor]  # images [B, 3, H, W] of one scene, its number -> [B]


def ring(box: Tensor, patch: int, size: int, actions: int = ACTIONS) -> Tensor:
    """[actions, 2]: left and top of patches whose centres walk around a box [4], equally far apart.

    The rectangle that they walk is the box, larger by half a patch on each side. Patches are moved
    into the image; those that then hide more than a quarter of the box are left out, others stand
    for them.
    """
    left, top, right, bottom = box.tolist()
    width, height = right - left + patch, bottom - top + patch
    steps = torch.arange(actions) * (2 * (width + height)) / actions
    x0, y0 = left - patch / 2, top - patch / 2
    walk = [_corner(float(step), width, height) for step in steps]
    corners = torch.tensor([[x0 + dx - patch / 2, y0 + dy - patch / 2] for dx, dy in walk])
    corners = corners.round().long().clamp(0, size - patch)
    kept = corners[hidden(box, corners, patch) <= 1 - FREE]
    if not len(kept):  # an item as large as the bag
        kept = corners[hidden(box, corners, patch).argmin()][None]
    return kept[torch.arange(actions) % len(kept)]


def _corner(step: float, width: float, height: float) -> tuple[float, float]:
    """Where one is after so many pixels along a rectangle, from its upper left."""
    if step < width:
        return step, 0.0
    if step < width + height:
        return width, step - width
    if step < 2 * width + height:
        return 2 * width + height - step, height
    return 0.0, 2 * (width + height) - step


def hidden(box: Tensor, corners: Tensor, patch: int) -> Tensor:
    """[N] share of the box [4] that patches at [N, 2] cover."""
    x = torch.minimum(corners[:, 0] + patch, box[2]) - torch.maximum(corners[:, 0], box[0])
    y = torch.minimum(corners[:, 1] + patch, box[3]) - torch.maximum(corners[:, 1], box[1])
    return x.clamp(min=0) * y.clamp(min=0) / ((box[2] - box[0]) * (box[3] - box[1]))


def paste(images: Tensor, patch: Tensor, corners: Tensor) -> Tensor:
    """Multiplies a patch [3, p, p] onto images [B, 3, H, W], each at its own corner [B, 2]."""
    size, p = images.shape[-1], patch.shape[-1]
    rows = torch.arange(size)[None] - corners[:, 1:]
    columns = torch.arange(size)[None] - corners[:, :1]
    inside = ((rows >= 0) & (rows < p))[:, :, None] & ((columns >= 0) & (columns < p))[:, None]
    spread = patch[:, rows.clamp(0, p - 1)[:, :, None], columns.clamp(0, p - 1)[:, None]]
    return images * torch.where(inside[:, None], spread.transpose(0, 1), 1.0)


def random(rings: Tensor, objects: int, generator: torch.Generator) -> Tensor:
    """[N, actions, 2] -> [N, objects, 2], any places."""
    chosen = torch.randint(rings.shape[1], (len(rings), objects), generator=generator)
    return rings.gather(1, chosen[..., None].expand(-1, -1, 2))


def greedy(images: Tensor, patches: Tensor, rings: Tensor, loss: Loss) -> Tensor:
    """[N, objects, 2]: for each patch [objects, 3, p, p] in turn the place with the largest loss.

    Args:
        loss: to be made large.
    """
    found = []
    for number, (image, own) in enumerate(zip(images, rings, strict=True)):
        places, best = [], image[None]
        for patch in patches:
            tried = paste(best.expand(len(own), -1, -1, -1), patch, own)
            chosen = int(loss(tried, number).argmax())
            places.append(own[chosen])
            best = tried[chosen : chosen + 1]
        found.append(torch.stack(places))
    return torch.stack(found)
