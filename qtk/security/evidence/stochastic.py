"""Is rounding to nearest worse than rounding at random?

Nearest rounding moves every weight least, so that an innocent model changes less by it than by
rounding up or down by chance, whose error has twice the variance. A planted model is made to change
by the one, and not by the other.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from qtk.security.evidence import GRANULARITIES, Evidence, Suspect
from qtk.security.minmax import MinMax, rounded

DRAWS = 8
THRESHOLD = 3.0  # standard deviations of the draws


def weigh(suspect: Suspect) -> Evidence:
    """How far nearest rounding's divergence from the float model lies above that of 8 draws."""
    scores: dict[str, float] = {}
    shown: dict[str, list[float]] = {}
    for per in GRANULARITIES:
        generator = suspect.generator()
        drawn = torch.tensor([_divergence(suspect, _at_random(suspect, per, generator))
                              for _ in range(DRAWS)])  # fmt: skip
        nearest = _divergence(suspect, suspect.nearest(per))
        spread = max(float(drawn.std()), 1e-3 * float(drawn.mean()), 1e-9)
        scores[per] = (nearest - float(drawn.mean())) / spread
        shown[f"rounded at random, per {per}"] = drawn.tolist()
        shown[f"rounded to nearest, per {per}"] = [nearest]
    worst = max(scores, key=scores.__getitem__)
    told = "worse" if scores[worst] > 0 else "better"
    return Evidence(
        "stochastic", scores[worst], THRESHOLD,
        f"per {worst}, rounding to nearest is {abs(scores[worst]):.1f} standard deviations {told} "
        "than rounding at random",
        shown,
    )  # fmt: skip


def _divergence(suspect: Suspect, logits: Tensor) -> float:
    """Mean Kullback-Leibler divergence from the float model, in nats."""
    mine, floats = logits.log_softmax(-1), suspect.floats.log_softmax(-1)
    return float(F.kl_div(mine, floats, log_target=True, reduction="batchmean"))


def _at_random(suspect: Suspect, per: str, generator: torch.Generator) -> Tensor:
    """The logits with weights rounded up as often as they are near the code above."""
    quantizer = MinMax(suspect.w, per)

    def drawn(weight: Tensor) -> Tensor:
        steps = quantizer.steps(weight)
        grid = steps.grid(weight[0].numel())
        chance = torch.rand(len(weight), weight[0].numel(), generator=generator).to(weight.device)
        levels = grid.clamp((weight.flatten(1).float() / grid.scale + chance).floor())
        return (levels * grid.scale).view_as(weight).to(weight.dtype)

    return suspect.logits(rounded(suspect.model, drawn))
