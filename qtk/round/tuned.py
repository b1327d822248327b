"""End-to-end tuning: the float model teaches the quantized one on unlabelled data.

Codes, weight scales, biases, activation scales and zero points of all layers learn together,
from GPTQ's, to give the float model's outputs (knowledge distillation, Hinton et al. 2015,
https://arxiv.org/abs/1503.02531), with gradients straight through the rounding. One batch in
eight is held out and picks the best point passed, the start included.
"""

from qtk.round._descent import Rates, Task, descend
from qtk.round.gptq import find as find

STEPS = 200
RATES = Rates(offset=0.01, scale=2e-3, zero_point=0.02)


def refine_model(task: Task) -> float:
    """Learns the whole model; returns its loss on held-out batches."""
    return descend(task, STEPS, RATES, checks=10)
