"""Block reconstruction: BRECQ, Li et al. 2021, https://arxiv.org/abs/2102.05426 (eq. 10), with
QDrop's dropping, Wei et al. 2022, https://arxiv.org/abs/2203.05740.

All linears of a block learn together to give the float model's block output from the inputs that
the quantized model has there: codes, weight scales, biases and activation scales. Each element of
their inputs stays in floating point with probability 1/2, which flattens what is found. Unlike the
papers' sigmoid of AdaRound, codes start at GPTQ's and move by straight-through offsets, because
GPTQ's have already left the float weights' neighbourhood.
"""

from qtk.round._descent import Rates, Task, descend
from qtk.round.gptq import find as find

KEPT = 0.5
STEPS = 60
RATES = Rates(offset=0.01, scale=1e-3, zero_point=0.01)


def refine_block(task: Task) -> float:
    """Learns one block; returns its relative error on held-out batches."""
    for linear in task.linears:
        linear.kept = KEPT
    return descend(task, STEPS, RATES, checks=4)
