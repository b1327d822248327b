"""Images with a patch in them, rated: how natural it looks, by a formula in the place of people.

What people say (PAN, CVPR 2023, github.com/zhangsn-19/PAN) cannot be drawn; what is drawn here is a
proxy. Naturalness is

    1 + 4 exp(-(colour / 40 + .5 |log slope ratio| + 4 area + .25 variation excess))

colour     distance in CIE Lab between the patch's mean and that of a ring around it
slope      of the power spectrum, of the patch over that of what it covers; each in [.25, 4]
area       share of the image
variation  mean difference of neighbouring pixels over the clean image's, beyond 1

Five raters' shares are softmax(-(k - naturalness)^2 / .5), k = 1 .. 5, and all look at the patch:
the map of gazes is its square, blurred (sigma 3 pixels), between 0 and 1.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from qtk.errors import CalibrationError

LEVELS = 5
KINDS = ("copied", "smoothed", "photograph", "colours", "noise")  # less natural from left to right
SIDES = (4, 12)  # of a patch, pixels
OPACITIES = (0.3, 1.0)
COLOUR, SLOPE, AREA, VARIATION = 1 / 40, 0.5, 4.0, 0.25
RING = 3  # pixels
SIGMA = 3.0
SLOPES = (0.25, 4.0)
WHITE = (0.95047, 1.0, 1.08883)  # D65
XYZ = ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750),
       (0.0193339, 0.1191920, 0.9503041))  # fmt: skip


@dataclass(frozen=True)
class Rated:
    """Images with a patch each.

    Attributes:
        images: [N, 3, H, W] in [0, 1]; clean: the same without patches.
        truth: [N], naturalness by the formula; ratings: [N, 5], shares of raters.
        gaze: [N, H, W] in [0, 1].
        boxes: [N, 4]: left, top, right, bottom of the patch, ends excluded.
        kinds: [N], places in `KINDS`.
    """

    images: Tensor
    clean: Tensor
    truth: Tensor
    ratings: Tensor
    gaze: Tensor
    boxes: Tensor
    kinds: Tensor


def draw(images: Tensor, seed: int = 0) -> Rated:
    """Puts a patch of any kind, size and opacity on each image [N, 3, H, W] in [0, 1].

    Raises:
        CalibrationError: fewer than two images, or other pixels.
    """
    H, W = images.shape[-2:]
    if len(images) < 2 or images.dim() != 4 or images.shape[1] != 3 or min(H, W) < 2 * SIDES[1]:
        raise CalibrationError(
            f"ratings are drawn on two images [N, 3, H, W] or more, of {2 * SIDES[1]} pixels a "
            f"side or more, not on {list(images.shape)}"
        )
    if not bool(((images >= 0) & (images <= 1)).all()):
        raise CalibrationError("ratings are of pixels in [0, 1]: give them before normalisation")
    generator = torch.Generator().manual_seed(seed)

    def below(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    kinds = torch.randint(len(KINDS), (len(images),), generator=generator)
    boxes, shown = [], images.clone()
    for i, kind in enumerate(kinds.tolist()):
        side = SIDES[0] + below(SIDES[1] - SIDES[0] + 1)
        left, top = below(W - side + 1), below(H - side + 1)
        box = (left, top, left + side, top + side)
        other = images[(i + 1 + below(len(images) - 1)) % len(images)]
        made = _patch(KINDS[kind], images[i], other, box, generator)
        drawn = torch.rand((), generator=generator)
        opacity = OPACITIES[0] + (OPACITIES[1] - OPACITIES[0]) * drawn
        region = shown[i, :, top : top + side, left : left + side]
        region += opacity * (made.clamp(0, 1) - region)
        boxes.append(box)
    shown = (shown * 255).round() / 255
    places = torch.tensor(boxes)
    found = truth(images, shown, places)
    return Rated(shown, images, found, ratings_of(found), gaze_of(places, (H, W)), places, kinds)


def _patch(
    kind: str, image: Tensor, other: Tensor, box: tuple[int, int, int, int],
    generator: torch.Generator,
) -> Tensor:  # fmt: skip
    """[3, s, s]"""
    left, top, right, bottom = box
    side, width = right - left, image.shape[-1]
    if kind == "copied":  # mirrored at the edge that has more beyond it
        columns = torch.arange(left, right)
        edge = left if left >= width - right else right
        mirrored = (2 * edge - 1 - columns).abs()
        mirrored = torch.minimum(mirrored, 2 * (width - 1) - mirrored)
        return image[:, top:bottom, mirrored]
    if kind == "smoothed":
        blurred = F.avg_pool2d(F.pad(image[None], (2, 2, 2, 2), "replicate"), 5, 1)[0]
        noise = 0.02 * torch.randn(3, side, side, generator=generator)
        return blurred[:, top:bottom, left:right] + noise
    if kind == "photograph":
        return F.adaptive_avg_pool2d(other, side)
    if kind == "colours":
        corners = torch.randint(2, (1, 3, 2, 2), generator=generator).float()
        return F.interpolate(corners, side, mode="bilinear")[0]
    return torch.rand(3, side, side, generator=generator)


def truth(clean: Tensor, shown: Tensor, boxes: Tensor) -> Tensor:
    """The formula: [N, 3, H, W] without and with patches, [N, 4] -> [N] in [1, 5]."""
    H, W = clean.shape[-2:]
    colours = lab(shown)
    found = []
    for before, after, own, box in zip(clean, shown, colours, boxes.tolist(), strict=True):
        left, top, right, bottom = box
        rows, columns = slice(top, bottom), slice(left, right)
        ring = torch.zeros(H, W, dtype=torch.bool)
        ring[max(0, top - RING) : bottom + RING, max(0, left - RING) : right + RING] = True
        ring[rows, columns] = False
        apart = own[:, rows, columns].mean((1, 2)) - own[:, ring].mean(1)
        slopes = [_slope(each[:, rows, columns]) for each in (after, before)]
        excess = _variation(after[:, rows, columns]) / max(_variation(before), 1e-3) - 1
        found.append(
            COLOUR * float(apart.norm())
            + SLOPE * abs(math.log(slopes[0] / slopes[1]))
            + AREA * (right - left) * (bottom - top) / (H * W)
            + VARIATION * max(0.0, excess)
        )
    return 1 + 4 * torch.exp(-torch.tensor(found))


def ratings_of(naturalness: Tensor) -> Tensor:
    """[N] -> [N, 5], what share of raters says 1 to 5."""
    levels = torch.arange(1, LEVELS + 1)
    return (-(levels - naturalness[:, None]).square() / 0.5).softmax(1)


def gaze_of(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """[N, 4] -> [N, H, W] in [0, 1]: a square blurred along rows and columns."""
    sides = []
    for length, low, high in ((size[0], 1, 3), (size[1], 0, 2)):
        at = torch.arange(length) + 0.5
        ends = [(at - boxes[:, end, None]) / (math.sqrt(2) * SIGMA) for end in (low, high)]
        sides.append(torch.erf(ends[0]) - torch.erf(ends[1]))
    return normalized(sides[0][:, :, None] * sides[1][:, None, :])


def normalized(maps: Tensor) -> Tensor:
    """[N, H, W], each image's own least value 0 and its largest 1."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low).clamp(min=1e-12)


def lab(images: Tensor) -> Tensor:
    """sRGB [N, 3, H, W] in [0, 1] -> CIE Lab, D65."""
    linear = torch.where(images <= 0.04045, images / 12.92, ((images + 0.055) / 1.055) ** 2.4)
    xyz = torch.einsum("ij,njhw->nihw", torch.tensor(XYZ), linear)
    t = xyz / torch.tensor(WHITE).view(3, 1, 1)
    delta = 6 / 29
    f = torch.where(t > delta**3, t.clamp(min=1e-12) ** (1 / 3), t / (3 * delta**2) + 4 / 29)
    x, y, z = f.unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


def _slope(region: Tensor) -> float:
    """b of power ~ f^-b, least squares on logarithms, of the grey region [3, s, s]."""
    grey = region.mean(0)
    power = torch.fft.fft2(grey - grey.mean()).abs().square().flatten()[1:]
    rows, columns = (torch.fft.fftfreq(n) for n in grey.shape)
    frequency = (rows[:, None].square() + columns.square()).sqrt().flatten()[1:]
    x, y = frequency.log(), (power + 1e-6).log()
    x, y = x - x.mean(), y - y.mean()
    return min(max(-float((x * y).sum() / x.square().sum()), SLOPES[0]), SLOPES[1])


def _variation(image: Tensor) -> float:
    """Mean absolute difference of neighbours, both ways, of [3, H, W]."""
    return float(image.diff(dim=-1).abs().mean() + image.diff(dim=-2).abs().mean())
