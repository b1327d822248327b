"""Where the rounded model answers otherwise, is it always the same?

Rounding errors of an innocent model push inputs over whichever boundary is near. A backdoor pushes
them into one class, the attacker's; random patches half trigger one that waits for a patch.
"""

import torch

from qtk.security.evidence import GRANULARITIES, Evidence, Suspect

THRESHOLD = 0.6  # share of the answers that changed
FEWEST = 0.01  # of all answers must have changed: few fall into one class by chance


def weigh(suspect: Suspect) -> Evidence:
    """The largest share that one class has among the answers that rounding changed."""
    best, shown, told = 0.0, {}, "rounding to nearest changes too few answers to tell"
    floats = suspect.floats.argmax(1)
    for per in GRANULARITIES:
        answers = suspect.nearest(per).argmax(1)
        changed = answers[answers != floats]
        counts = torch.bincount(changed, minlength=suspect.floats.shape[1])
        shown[f"changed answers by class, per {per}"] = counts.tolist()
        if len(changed) < max(FEWEST * len(answers), 2 * len(counts)):
            continue
        share = float(counts.max()) / len(changed)
        if share > best:
            best = share
            told = (
                f"per {per}, rounding to nearest changes {len(changed)} of {len(answers)} answers, "
                f"{100 * share:.0f} % of them to class {int(counts.argmax())}"
            )
    return Evidence("concentration", best, THRESHOLD, told, shown)
