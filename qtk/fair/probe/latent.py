"""LIMI (Latent Imitator, ISSTA 2023): rows near the boundary of a latent space.

A linear boundary n.z + c = 0, |n| = 1, imitates the model's on decoded latents: a support vector
machine on those whose winning probability is above .7. Each latent is moved onto it, and then .3 to
either side,

    z0 = z - (n.z + c) n,   z+ = z0 + .3 n,   z- = z0 - .3 n,

and the three are decoded and tried in this order until one is discriminatory. Rows alike in all but
the protected attribute are tried once.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

from qtk.errors import CalibrationError
from qtk.fair.answer import Answer, decide
from qtk.fair.decoder import Decoder
from qtk.fair.domain import Attribute, Domain

NEEDS_DECODER = True
LATENTS = 20_000
CONFIDENT = 0.7
STEP = 0.3
SIDE = 50_000  # latents of one class that the boundary is fitted on, at most


def draw(
    answer: Answer, rows: Tensor, domain: Domain, protected: Attribute, n: int,
    generator: torch.Generator, *, decoder: Decoder, latents: int = LATENTS, step: float = STEP,
) -> Tensor:  # fmt: skip
    """The rows that were tried: [M, T], M <= n, fewer where the latents run out.

    Raises:
        CalibrationError: the model is sure of one decision only.
    """
    z = torch.randn(latents, decoder.size, generator=generator)
    normal, offset = boundary(answer, decoder, z)
    tried: dict[int, Tensor] = {}
    for part in z.split(max(1, n // 8)):
        center = part - (part @ normal + offset)[:, None] * normal
        for shift in (0.0, step, -step):
            rows = decoder.decode(center + shift * normal).clone()
            rows[:, protected.position] = protected.values[0]
            for number, row in zip(domain.index(rows).tolist(), rows, strict=True):
                tried.setdefault(number, row)
            center = center[~answer.unfair(rows, protected)]
            if not len(center):
                break
        if len(tried) >= n:
            break
    return torch.stack(list(tried.values())[:n])


def boundary(answer: Answer, decoder: Decoder, z: Tensor) -> tuple[Tensor, float]:
    """The unit normal [size] and offset that imitate the model on latents [N, size].

    Raises:
        CalibrationError: the model is sure of one decision only.
    """
    logits = answer.logits(decoder.decode(z))
    probability = logits.softmax(1).amax(1)
    favourable = decide(logits) == answer.favourable
    sides = []
    for side in (favourable, ~favourable):
        own = (side & (probability > CONFIDENT)).nonzero()[:, 0]
        sides.append(own[probability[own].argsort(descending=True)[:SIDE]])
    if not all(map(len, sides)):
        raise CalibrationError(
            f"probe 'latent': of {len(z)} decoded rows none is decided "
            f"{'against' if len(sides[0]) else 'for'} class {answer.favourable} with a probability "
            f"above {CONFIDENT}: the boundary cannot be found; leave the probe out"
        )
    most = max(map(len, sides))
    balanced = [z[own.repeat(-(-most // len(own)))[:most]] for own in sides]
    signs = torch.cat([torch.ones(most), -torch.ones(most)])
    weight, bias = svm(torch.cat(balanced).double().numpy(), signs.double().numpy())
    length = float(np.linalg.norm(weight))
    return torch.from_numpy(weight / length).float(), bias / length


def svm(
    x: NDArray[np.float64], y: NDArray[np.float64], c: float = 1.0
) -> tuple[NDArray[np.float64], float]:
    """Linear support vector machine with squared hinge: weight [K] and bias.

    Minimises (|w|^2 + b^2) / 2 + c sum max(0, 1 - y (x.w + b))^2, as LIBLINEAR does.
    """
    x = np.concatenate([x, np.ones((len(x), 1))], 1)

    def loss(w: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        slack = np.maximum(0, 1 - y * (x @ w))
        return float(w @ w / 2 + c * slack @ slack), w - 2 * c * x.T @ (y * slack)

    found = minimize(loss, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B")
    return found.x[:-1], float(found.x[-1])
