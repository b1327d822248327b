import pytest
import torch

from qtk_kernels.hadamard_quantize import hadamard, hadamard_quantize

OUTPUTS = [
    {"bits": 8, "step": 0.13, "zero_point": 3},
    {"bits": 4, "step": 2.0, "packed": True, "zero_point": -1},
    {"bits": 4, "granularity": "token", "clip": 0.9, "signed": False},
    {"bits": 4, "granularity": 32, "packed": True},
]


def sylvester(size):
    """H / sqrt(size), by its own definition: H of 2n is [[H, H], [H, -H]]."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h * size**-0.5


@pytest.mark.parametrize("block", [1, 2, 8, 64])
def test_rotation_is_sylvesters_matrix(block):
    x = torch.randn(3, 2, 192)
    exact = (x.double().unflatten(-1, (-1, block)) @ sylvester(block)).flatten(-2)
    assert torch.allclose(hadamard(x, block).double(), exact, atol=1e-6)
    assert torch.allclose(hadamard(hadamard(x, block), block), x, atol=1e-6)


def test_rotation_spreads_an_outlier():
    x = torch.zeros(1, 64)
    x[0, 5] = 8.0
    assert torch.equal(hadamard(x).abs(), torch.ones(1, 64))


@pytest.mark.parametrize("K, block", [(1, 1), (96, 32), (130, 2), (1536, 512)])
@pytest.mark.parametrize("output", OUTPUTS, ids=str)
def test_kernel_equals_reference(K, block, output):
    x, multiplier, offset = torch.randn(3, K) * 4, torch.rand(K), torch.randn(K)
    args = {"block": block, **output}
    want = hadamard_quantize(x, multiplier, offset, **args, backend="reference")
    got = hadamard_quantize(x, multiplier, offset, **args, backend="triton")
    assert torch.equal(got[0], want[0])
    assert got[1] is want[1] is None or torch.equal(got[1], want[1])


def test_errors_say_what_was_expected():
    with pytest.raises(ValueError, match="power of two that divides 96, got 64"):
        hadamard_quantize(torch.zeros(1, 96), block=64, step=1.0, bits=8, backend="triton")
    with pytest.raises(ValueError, match="needs a step, got None"):
        hadamard_quantize(torch.zeros(1, 64), block=64, bits=8)


def test_compiles_to_one_graph():
    x = torch.randn(4, 64)

    def run(x):
        return hadamard_quantize(x, block=32, bits=4, granularity="token")[0]

    assert torch.equal(torch.compile(run, fullgraph=True, backend="eager")(x), run(x))
