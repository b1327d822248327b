"""Is rounding to nearest worse than rounding at random?

Nearest rounding moves every weight least, so that an innocent model changes less by it than by
rounding up or down by chance, whose error has twice the variance. A planted model is made to change
by the one, and not by the other.
"""

from statistics import mean, stdev

from qtk.security.evidence import GRANULARITIES, Evidence, Suspect, divergence

THRESHOLD = 3.0  # standard deviations of the draws


def weigh(suspect: Suspect) -> Evidence:
    """How far nearest rounding's divergence from the float model lies above that of 8 draws."""
    scores: dict[str, float] = {}
    shown: dict[str, list[float]] = {}
    for per in GRANULARITIES:
        drawn = [divergence(suspect, logits) for logits in suspect.at_random(per)]
        nearest = divergence(suspect, suspect.nearest(per))
        spread = max(stdev(drawn), 1e-3 * mean(drawn), 1e-9)
        scores[per] = (nearest - mean(drawn)) / spread
        shown[f"rounded at random, per {per}"] = drawn
        shown[f"rounded to nearest, per {per}"] = [nearest]
    worst = max(scores, key=scores.__getitem__)
    told = "worse" if scores[worst] > 0 else "better"
    return Evidence(
        "stochastic", scores[worst], THRESHOLD,
        f"per {worst}, rounding to nearest is {abs(scores[worst]):.1f} standard deviations {told} "
        "than rounding at random",
        shown,
    )  # fmt: skip
