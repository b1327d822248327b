"""Balls of triangles in the unit cube; faces are seen anticlockwise from outside."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qtk.errors import CalibrationError

RADIUS = 1 / 2.4  # of X-Adv's balls, around .5
RINGS, SEGMENTS = 4, 6  # 26 vertices, 48 faces


@dataclass(frozen=True)
class Mesh:
    """A closed surface.

    Attributes:
        vertices: [V, 3] float, x, y, z in [0, 1]; rays run along z.
        faces: [F, 3] int64, numbers of vertices.

    Raises:
        CalibrationError: the surface is not closed, or not of triangles of its vertices.
    """

    vertices: Tensor
    faces: Tensor

    def __post_init__(self) -> None:
        if self.vertices.shape[1:] != (3,) or self.faces.shape[1:] != (3,) or not len(self.faces):
            raise CalibrationError(
                f"a mesh has vertices [V, 3] and faces [F, 3], not {list(self.vertices.shape)} and "
                f"{list(self.faces.shape)}"
            )
        if int(self.faces.min()) < 0 or int(self.faces.max()) >= len(self.vertices):
            raise CalibrationError(f"faces name vertices beyond the {len(self.vertices)} there are")
        edges = self.edges()
        numbers = edges[:, 0] * len(self.vertices) + edges[:, 1]
        back = edges[:, 1] * len(self.vertices) + edges[:, 0]
        closed = torch.equal(numbers.sort().values, back.sort().values)
        if not closed or len(numbers.unique()) < len(numbers):
            raise CalibrationError(
                "the mesh is not watertight: every edge must belong to two faces, one each way; "
                "close its holes and turn all faces outward"
            )

    def edges(self) -> Tensor:
        """[3 F, 2], directed."""
        return torch.cat([self.faces[:, [0, 1]], self.faces[:, [1, 2]], self.faces[:, [2, 0]]])

    def variation(self, vertices: Tensor) -> Tensor:
        """Of moved vertices [V, 3]: mean over edges of |(v_i - v_i0) - (v_j - v_j0)|^2."""
        moved = vertices - self.vertices
        ends = moved[self.edges()]
        return (ends[:, 0] - ends[:, 1]).square().sum(1).mean()


def ball(rings: int = RINGS, segments: int = SEGMENTS) -> Mesh:
    """Two poles and rings between them: 2 + rings * segments vertices."""
    polar = torch.arange(1, rings + 1) * torch.pi / (rings + 1)
    around = torch.arange(segments) * 2 * torch.pi / segments
    x = polar.sin()[:, None] * around.cos()
    y = polar.sin()[:, None] * around.sin()
    z = polar.cos()[:, None].expand_as(x)
    body = torch.stack([x, y, z], -1).reshape(-1, 3)
    poles = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, -1.0]])
    top, bottom = len(body), len(body) + 1
    faces = []
    for s in range(segments):
        t, last = (s + 1) % segments, (rings - 1) * segments
        faces += [[top, s, t], [bottom, last + t, last + s]]
        for r in range(rings - 1):
            a, b, c, d = (k * segments + m for k, m in ((r, s), (r, t), (r + 1, s), (r + 1, t)))
            faces += [[a, c, d], [a, d, b]]
    return Mesh(0.5 + RADIUS * torch.cat([body, poles]), torch.tensor(faces))
