"""End-to-end tuning: the float model teaches the quantized one on unlabelled data.

Codes, weight scales, biases, activation scales and zero points of all layers learn together,
from GPTQ's, to give the float model's outputs (knowledge distillation, Hinton et al. 2015,
https://arxiv.org/abs/1503.02531), with gradients straight through the rounding. One batch in
eight is held out and picks the best point passed, the start included.
"""

from qtk.discover import load
from qtk.round import Problem, Rounded
from qtk.round._descent import Rates, Task, descend

STEPS = 200
RATES = Rates(offset=0.01, scale=2e-3, zero_point=0.02)


def find(problem: Problem) -> Rounded:
    """Where learning starts."""
    rounded: Rounded = load("round", "gptq").find(problem)
    return rounded


def refine_model(task: Task) -> float:
    """Learns the whole model; returns its loss on held-out batches."""
    return descend(task, STEPS, RATES, checks=10)
