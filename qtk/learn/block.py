"""Block reconstruction: BRECQ, Li et al. 2021, https://arxiv.org/abs/2102.05426 (eq. 10), with
QDrop's dropping, Wei et al. 2022, https://arxiv.org/abs/2203.05740.

All linears of a block learn together to give the float model's block output from the inputs that
the quantized model has there: codes, weight scales, biases and activation scales. Each element of
their inputs stays in floating point with probability 1/2, which flattens what is found. Unlike the
papers' sigmoid of AdaRound, codes start at a rounder's and move by straight-through offsets,
because GPTQ's have already left the float weights' neighbourhood.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from qtk.learn.descent import Learned, Rates, Report, Task, descend
from qtk.learn.objective import relative_error
from qtk.learn.trainable import trainable
from qtk.observe import Call, run

RATES = Rates(offset=0.01, scale=1e-3, zero_point=0.01)


def learn_block(
    module: nn.Module, calls: Sequence[Call], seed: int, report: Report, *, steps: int = 60,
    kept: float = 0.5, rates: Rates = RATES,
) -> Learned:  # fmt: skip
    """Learns the integer linears of a block, in place.

    Args:
        module: the block; its quantized stream is what `calls` hold as inputs, and the float
            model's output of the same block what they hold as `float_hidden`.
        seed: of what is dropped, and of the order of the calls.
        steps: calls that are learned from.
        kept: share of the input elements that are quantized in each step.
    """

    def loss(i: int) -> Tensor:
        call = calls[i]
        got = run(module, call.hidden, call)
        return relative_error(call.seen(got), call.seen(call.float_hidden))

    with trainable(module, kept) as linears:
        task = Task(list(linears.values()), loss, len(calls), seed, report)
        return descend(task, steps, rates, checks=4)
