"""Every op captured in a CUDA graph and replayed on other inputs; needs a GPU."""

import pytest
import torch

from tests.kernels.test_no_sync import CALLS, random

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="captures CUDA graphs, which needs a GPU"
)
NEEDS_FP8 = ("fp8",)


def results(y):
    return [t for t in (y if isinstance(y, tuple) else (y,)) if t is not None]


def bits(x):
    return x.contiguous().view(torch.uint8)


@pytest.mark.parametrize("name", CALLS)
def test_replays_read_new_inputs_and_give_the_bits_of_a_call(name):
    if name in NEEDS_FP8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("tensor cores multiply float8 from sm_89 on")
    inputs = []

    def make(*shape_and_dtype):
        inputs.append(random(*shape_and_dtype).cuda())
        return inputs[-1]

    def again():
        rest = iter(inputs)
        return CALLS[name](lambda *_: next(rest), "triton")

    CALLS[name](make, "triton")  # compiles, and makes the inputs
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # raises where an op waits for the device
        captured = results(again())
    for _ in range(2):
        for x in inputs:
            x.copy_(random(*x.shape, x.dtype))
        for y in captured:
            y.view(torch.uint8).fill_(77)
        graph.replay()
        torch.cuda.synchronize()
        assert [torch.equal(bits(a), bits(b)) for a, b in zip(captured, results(again()),
                strict=True)] == [True] * len(captured)  # fmt: skip


def test_a_call_allocates_its_results_and_nothing_else():
    """No workspace is left behind, and no call after the first reserves memory."""
    inputs = []

    def make(*shape_and_dtype):
        inputs.append(random(*shape_and_dtype).cuda())
        return inputs[-1]

    CALLS["W8A8"](make, "triton")
    torch.cuda.synchronize()
    before, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(3):
        rest = iter(inputs)
        y = CALLS["W8A8"](lambda *_, rest=rest: next(rest), "triton")
    size = -(-y.nbytes // 512) * 512  # as the allocator rounds
    assert torch.cuda.memory_allocated() == before + size
    assert torch.cuda.memory_reserved() == reserved
