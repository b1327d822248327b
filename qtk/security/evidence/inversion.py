"""Does one class need a smaller patch than the others to be given by the rounded model alone?

Trigger inversion (Neural Cleanse, Wang et al. 2019) on the difference of the two: for each class t

    minimise  CE(q(x'), t) + CE(f(x'), f's own answer) + size of m,     x' = (1 - m) x + m p

over one mask m [1, H, W] and one pattern p [C, H, W] for all images, of which others are then
judged. Whatever patch serves rounding errors that nobody planted serves several classes; an
attacker's serves his. So what counts is how far the best class lies above the middle one. It is
enough alone: who has found such a patch has found a backdoor, planted or not.
"""

from collections.abc import Callable, Mapping
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qtk.security.evidence import GRANULARITIES, Evidence, Suspect
from qtk.security.minmax import Inputs, MinMax, logits_of, rounded

THRESHOLD = 0.3  # of 24 innocent models the largest is .22, of 12 planted ones the smallest .42
IMAGES, FITTED, STEPS, RATE = 256, 64, 60, 0.3
SIZE = 30.0  # weight of the mask's size, a share of the image; it grows over the first half
MOST_CLASSES = 10  # that are tried: those that the rounded model answers most


def weigh(suspect: Suspect) -> Evidence:
    """The largest distance between the best class and the middle one of the others."""
    name, images = _images(suspect)
    if images is None or len(images) < 2:
        return Evidence("inversion", 0.0, THRESHOLD, "only images are looked at", {"share": [0.0]})
    best, shown = (0.0, "no class stands out"), {}
    for per in GRANULARITIES:
        counts = suspect.nearest(per).argmax(1).bincount(minlength=suspect.floats.shape[1])
        tried = counts.argsort(descending=True, stable=True)[:MOST_CLASSES].sort().values.tolist()
        twin = rounded(suspect.model, MinMax(suspect.w, per))
        shares = [_share(suspect, twin, name, images, t) for t in tried]
        shown[f"share of images, by class, per {per}"] = shares
        first = max(range(len(tried)), key=shares.__getitem__)
        others = median(share for i, share in enumerate(shares) if i != first)
        told = (
            f"per {per}, one patch takes {100 * shares[first]:.0f} % of the images to class "
            f"{tried[first]} in the rounded model alone, {100 * others:.0f} % to the middle one of "
            "the others"
        )
        best = max(best, (shares[first] - others, told))
    return Evidence("inversion", best[0], THRESHOLD, best[1], shown, alone=True)


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


def _share(suspect: Suspect, twin: nn.Module, name: str | None, images: Tensor, t: int) -> float:
    """Of images that a patch was not found on, those that it takes to class t in `twin` alone."""

    def given(x: Tensor) -> Inputs:
        return x if name is None else {name: x}

    cut = min(FITTED, len(images) // 2)
    patched = _patch(suspect.model, twin, given, images[:cut], t)
    with torch.no_grad():
        answers = logits_of(suspect.model, given(images[cut:])).argmax(1)
        x = given(patched(images[cut:]))
        moved = logits_of(twin, x).argmax(1) == t
        stays = logits_of(suspect.model, x).argmax(1) != t
    others = answers != t
    return float((moved & stays)[others].float().mean()) if others.any() else 0.0


@torch.enable_grad()
def _patch(
    model: nn.Module, twin: nn.Module, given: Callable[[Tensor], Inputs], images: Tensor, t: int
) -> Callable[[Tensor], Tensor]:
    """What puts the patch that was found for class t onto images."""
    lowest, highest = float(images.min()), float(images.max())
    answers = logits_of(model, given(images)).detach().argmax(1)
    aim = torch.full_like(answers, t)
    mask = torch.full_like(images[:1, :1], -1.0).requires_grad_()
    pattern = torch.zeros_like(images[:1]).requires_grad_()
    optimizer = torch.optim.Adam([mask, pattern], lr=RATE)

    def patched(x: Tensor) -> Tensor:
        m = mask.sigmoid()
        return (1 - m) * x + m * (lowest + (highest - lowest) * pattern.sigmoid())

    for step in range(STEPS):
        x = given(patched(images))
        loss = F.cross_entropy(logits_of(twin, x), aim)
        loss = loss + F.cross_entropy(logits_of(model, x), answers)
        size = SIZE * min(1.0, 2 * step / STEPS) * mask.sigmoid().mean()
        mask.grad, pattern.grad = torch.autograd.grad(loss + size, [mask, pattern])
        optimizer.step()
    return patched
