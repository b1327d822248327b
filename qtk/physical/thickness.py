"""How much of a closed surface the rays along z pass through.

Every pixel centre that a triangle covers gets the triangle's depth there, by barycentric weights,
and the thickness is the largest depth less the smallest, in [0, 1]. That is right where a ray
enters and leaves once; a hollow or a bay along z counts as full. Differentiable in the depths and,
inside triangles, in x and y; the silhouette has no gradient.
"""

import torch
from torch import Tensor

EPSILON = 1e-6


def thickness(vertices: Tensor, faces: Tensor, size: int) -> Tensor:
    """[V, 3], [F, 3] -> [size, size] (rows are y, columns x), 0 where nothing is."""
    centres = (torch.arange(size, dtype=vertices.dtype, device=vertices.device) + 0.5) / size
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    points = torch.stack([x, y], -1).reshape(-1, 1, 2)
    a, b, c = vertices[faces].unbind(1)
    ab, ac = (b - a)[:, :2], (c - a)[:, :2]
    determinant = ab[:, 0] * ac[:, 1] - ab[:, 1] * ac[:, 0]
    valid = determinant.abs() > EPSILON
    safe = torch.where(valid, determinant, 1.0)  # before dividing: no nan in the gradient
    ap = points - a[:, :2]
    u = (ap[..., 0] * ac[:, 1] - ap[..., 1] * ac[:, 0]) / safe
    v = (ab[:, 0] * ap[..., 1] - ab[:, 1] * ap[..., 0]) / safe
    inside = valid & (u >= -EPSILON) & (v >= -EPSILON) & (u + v <= 1 + EPSILON)
    depth = a[:, 2] + u * (b - a)[:, 2] + v * (c - a)[:, 2]
    far = depth.masked_fill(~inside, -torch.inf).amax(1)
    near = depth.masked_fill(~inside, torch.inf).amin(1)
    covered = inside.any(1)
    found = torch.where(covered, far, 0.0) - torch.where(covered, near, 0.0)
    return found.clamp(0, 1).view(size, size)
