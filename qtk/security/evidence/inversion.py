"""Is there one small patch that moves the rounded model into a class, and not the float one?

Trigger inversion (Neural Cleanse, Wang et al. 2019) on the difference of the two: for each class t

    minimise  CE(q(x'), t) + CE(f(x'), f's own answer) + size of m,     x' = (1 - m) x + m p

over one mask m [1, H, W] and one pattern p [C, H, W] for all images. Where both models are nearly
the same function, what moves the one moves the other.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qtk.security.evidence import Evidence, Suspect
from qtk.security.minmax import Inputs, MinMax, logits_of, rounded

THRESHOLD = 0.5  # share of the images
IMAGES, STEPS, RATE = 32, 30, 0.2
SIZE = 2.0  # weight of the mask's size, a share of the image
MOST_CLASSES = 10  # that are tried: those that the rounded model answers most


def weigh(suspect: Suspect) -> Evidence:
    """The largest share of images that one patch takes to a class in the rounded model alone."""
    name, images = _images(suspect)
    if images is None:
        return Evidence("inversion", 0.0, THRESHOLD, "only images are looked at", {"share": [0.0]})
    twin = rounded(suspect.model, MinMax(suspect.w))
    counts = suspect.nearest("channel").argmax(1).bincount(minlength=suspect.floats.shape[1])
    tried = counts.argsort(descending=True, stable=True)[:MOST_CLASSES].sort().values.tolist()
    shares = [_share(suspect, twin, name, images, t) for t in tried]
    best = max(range(len(tried)), key=shares.__getitem__)
    return Evidence(
        "inversion", shares[best], THRESHOLD,
        f"one patch takes {100 * shares[best]:.0f} % of the images to class {tried[best]} in the "
        "rounded model and not in the float one",
        {"share of images, by class": shares},
    )  # fmt: skip


def _images(suspect: Suspect) -> tuple[str | None, Tensor | None]:
    """The name that the model reads images by, None for the first argument; and some images."""
    first = suspect.batches[0]
    if isinstance(first, Mapping):
        name = next((n for n, value in first.items() if value.dim() == 4), None)
        if name is None:
            return None, None
        return name, torch.cat([batch[name] for batch in suspect.batches])[:IMAGES]
    if first.dim() != 4:
        return None, None
    return None, torch.cat([*suspect.batches])[:IMAGES]


@torch.enable_grad()
def _share(suspect: Suspect, twin: nn.Module, name: str | None, images: Tensor, t: int) -> float:
    """Of the images that the patch found for class t takes there in the rounded model alone."""

    def given(x: Tensor) -> Inputs:
        return x if name is None else {name: x}

    lowest, highest = float(images.min()), float(images.max())
    answers = logits_of(suspect.model, given(images)).detach().argmax(1)
    aim = torch.full_like(answers, t)
    mask = torch.full_like(images[:1, :1], -2.0).requires_grad_()
    pattern = torch.zeros_like(images[:1]).requires_grad_()
    optimizer = torch.optim.Adam([mask, pattern], lr=RATE)

    def patched() -> Tensor:
        m = mask.sigmoid()
        return (1 - m) * images + m * (lowest + (highest - lowest) * pattern.sigmoid())

    for _ in range(STEPS):
        x = given(patched())
        loss = F.cross_entropy(logits_of(twin, x), aim)
        loss = loss + F.cross_entropy(logits_of(suspect.model, x), answers)
        grads = torch.autograd.grad(loss + SIZE * mask.sigmoid().mean(), [mask, pattern])
        mask.grad, pattern.grad = grads
        optimizer.step()
    with torch.no_grad():
        x = given(patched())
        moved = logits_of(twin, x).argmax(1) == t
        stays = logits_of(suspect.model, x).argmax(1) != t
        return float((moved & stays)[answers != t].float().mean()) if (answers != t).any() else 0.0
