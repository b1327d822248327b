"""Round to nearest, on the grid with the smallest error.

    scale = argmin over clip ratios of  sum_k h_k (w_k - w_hat_k)^2,   h_k = mean_t x_tk^2

(h = 1 without data). At 8 bits the whole range nearly always wins; at 4 and less it does not.
"""

from qtk.numerics import expand_groups, quantize
from qtk.round import Problem, Rounded, best_scale


def find(problem: Problem) -> Rounded:
    importance = None if problem.inputs is None else problem.inputs.square().mean(0)
    scale = best_scale(problem.weight, problem.fmt, importance)
    K = problem.weight.shape[1]
    full = expand_groups(scale, K, problem.fmt.group_size)
    return quantize(problem.weight, full, 0, problem.fmt), scale
