"""What a scanner shows: thickness and material to a colour that multiplies the image.

Fitted (X-Adv, USENIX Security 2023, github.com/DIG-Beihang/X-adv): hue is a
material's own, saturation and value are a exp(b t) + c of the depth t = thickness * t_max, on
OpenCV's scales (hue below 180, the others up to 255). A thickness of nothing is white; the curves
do not begin there, so that silhouettes jump.

Physical: two energies, I_c = sum_e S_c(e) exp(-sum_m mu_m(e) t_m). White where there is nothing,
continuous, and thicknesses add inside the exponent. Its numbers are chosen, not measured.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qtk.errors import SchemeError

Curve = tuple[float, float, float]  # a, b, c


@dataclass(frozen=True)
class Material:
    """Attributes: deepest t; hue; curves of saturation and value; attenuation at two energies."""

    t_max: float
    hue: float
    saturation: Curve
    value: Curve
    attenuation: tuple[float, float]


MATERIALS = {
    "iron": Material(
        8, 104.306, (-199.269, -1.31691, 227.178), (-21.8945, 0.203361, 274.637), (6.0, 2.5)
    ),
    "aluminium": Material(
        10, 44.914, (-162.051, -0.153755, 169.874), (68.9094, -0.146888, 174.055), (1.6, 0.9)
    ),
    "plastic": Material(
        40, 16.055, (-175.960, -0.0279800, 226.590), (-1.19776, 0.0321278, 251.999), (0.4, 0.35)
    ),
}
SPECTRUM = ((0.8, 0.2), (0.5, 0.5), (0.2, 0.8))  # S_c(e) of red, green, blue


def colour(thickness: Tensor, material: str) -> Tensor:
    """Fitted: [...] in [0, 1] -> RGB [..., 3] in [0, 1].

    Raises:
        SchemeError: a material that is not known.
    """
    own = material_of(material)
    t = thickness * own.t_max
    s, v = ((a * (b * t).exp() + c).clamp(0, 255) / 255 for a, b, c in (own.saturation, own.value))
    # HSV to RGB: channel = v - v s max(0, min(k, 4 - k, 1)), k = (n + hue / 60 degrees) mod 6
    turns = 2 * own.hue / 60
    share = [max(0.0, min(k := (n + turns) % 6, 4 - k, 1.0)) for n in (5, 3, 1)]
    rgb = torch.stack([v - v * s * each for each in share], -1)
    return torch.where((thickness > 0)[..., None], rgb, 1.0)


def transmission(thicknesses: Mapping[str, Tensor]) -> Tensor:
    """Physical: [...] of each material -> RGB [..., 3] in [0, 1]."""
    first = next(iter(thicknesses.values()))
    paths = [
        sum((material_of(m).attenuation[e] * t for m, t in thicknesses.items()), 0 * first)
        for e in (0, 1)
    ]
    left = torch.stack([torch.as_tensor(-path).exp() for path in paths], -1)
    return left @ torch.tensor(SPECTRUM, dtype=left.dtype, device=left.device).T


def material_of(name: str) -> Material:
    if name not in MATERIALS:
        raise SchemeError(f"no material {name!r}; there is: {', '.join(MATERIALS)}")
    return MATERIALS[name]
