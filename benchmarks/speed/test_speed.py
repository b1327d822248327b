"""The speeds that the README compares, through pytest-benchmark, and the tables of CPUs.

python -m pytest benchmarks
"""

from typing import Any

import pytest
import torch

from benchmarks.speed import cpu_models, gpu_kernels
from benchmarks.speed.cpu_contenders import CONTENDERS, MODELS, Size, build, inputs_of
from qtk_kernels.tune import KERNELS, microseconds


@pytest.mark.parametrize("model", MODELS)
def test_cpu_table(model: str) -> None:
    """The whole tables, written to results."""
    cpu_models.measure_and_write(model)


@pytest.mark.parametrize("size", cpu_models.SIZES["minilm"], ids=str)
@pytest.mark.parametrize("what", ["float32", "qtk W8A8"])
def test_cpu_minilm(benchmark: Any, what: str, size: Size) -> None:
    """The two sides that the README compares."""
    forward, inputs = CONTENDERS[what](build("minilm"), "minilm"), inputs_of("minilm", size)
    with torch.inference_mode():
        benchmark(lambda: forward(inputs))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="measures on a GPU")
@pytest.mark.parametrize("kernel", [*KERNELS, gpu_kernels.FROM_FLOAT])
def test_gpu_kernel(benchmark: Any, kernel: str) -> None:
    """The host's time of a call in its turn, with the device's beside it."""
    calls = gpu_kernels.calls_of(kernel, (16, 4096, 4096))
    benchmark.extra_info["device_us"] = microseconds(calls)
    turn = iter(range(10**9))
    benchmark(lambda: calls[next(turn) % len(calls)]())
    torch.cuda.synchronize()
