import pytest
import torch

from qtk_kernels import _launch
from qtk_kernels.codes import Codes
from qtk_kernels.hadamard import orthogonal, split
from qtk_kernels.hadamard_quantize import hadamard, hadamard_launch, hadamard_quantize
from qtk_kernels.packing import unpack_int4

ULP = 2.0**-24
OUTPUTS = [
    Codes(8),
    Codes(4, packed=True),
    Codes(4, "token", offset=8, clip=0.9),
    Codes(4, 32, packed=True),
    Codes(4, 20, packed=True),
]


def matrix(block):
    """blockdiag of the Kronecker product of the two small matrices, float64."""
    blocks, f, p = split(block)
    R = torch.kron(orthogonal(f).double(), orthogonal(p).double())
    return torch.block_diag(*[R] * blocks)


@pytest.mark.parametrize(
    "K, block", [(192, 1), (192, 2), (192, 64), (96, 24), (197, 197), (60, 60)]
)
def test_rotation_multiplies_by_the_matrix(K, block):
    x = torch.randn(3, 2, K)
    exact = (x.double().unflatten(-1, (-1, block)) @ matrix(block)).flatten(-2)
    assert torch.allclose(hadamard(x, block).double(), exact, atol=1e-5)


def test_rotation_spreads_an_outlier():
    x = torch.zeros(1, 64)
    x[0, 5] = 8.0
    assert torch.allclose(hadamard(x).abs(), torch.ones(1, 64))


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(
    "K, block",
    [(1, 1), (96, 32), (130, 2), (1536, 512), (12, 12), (197, 197), (144, 144), (80, 40)],
)
@pytest.mark.parametrize("output", OUTPUTS, ids=str)
def test_codes_round_the_exact_value(K, block, output, backend, assert_codes_agree):
    """K roundings of the largest sum there is bound any order of summation, products included."""
    x, multiplier, offset = torch.randn(3, K) * 4, torch.rand(K), torch.randn(K)
    out_multiplier, out_offset = torch.rand(K) * 3, torch.randn(K)
    q, scale = hadamard_quantize(
        x, multiplier, offset, output, block=block, out_multiplier=out_multiplier,
        out_offset=out_offset, backend=backend,
    )  # fmt: skip
    u = x.double() * multiplier + offset
    R = matrix(block)
    y = (u.unflatten(-1, (-1, block)) @ R).flatten(-2) * out_multiplier + out_offset
    size = (u.abs().unflatten(-1, (-1, block)) @ R.abs()).flatten(-2)
    tolerance = (block + 8) * ULP * size * out_multiplier + 4 * ULP * (y.abs() + out_offset.abs())
    q = unpack_int4(q, K) if output.packed else q
    if not output.static:
        group = min(output.group_size(K), K)
        step = scale.double().repeat_interleave(group, -1)[:, :K]
        # the step itself is off by the error of the largest value of its group
        widest = tolerance.amax(-1, keepdim=True) * 2
        y, tolerance = y / step, (tolerance + widest) / step + 8 * ULP * (y / step).abs()
    q = q.int() - output.added
    assert_codes_agree(q, y.round().clamp(output.qmin, output.qmax), y, tolerance)


@pytest.mark.parametrize("K, block", [(96, 32), (192, 192)])
def test_several_rows_in_a_program(K, block, monkeypatch):
    args = {"block": block, "backend": "triton"}
    x, codes = torch.randn(13, K), Codes(8, "token")
    want = hadamard_quantize(x, None, None, codes, **args)
    monkeypatch.setattr(_launch, "SMS", 1)
    got = hadamard_quantize(x, None, None, codes, **args)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_no_kernel_moves_channels():
    """Padded factors and groups that end inside a block are left to PyTorch."""
    assert hadamard_launch(8, 768, 768, Codes(8)) is not None
    assert hadamard_launch(8, 384, 384, Codes(8)) is None
    assert hadamard_launch(8, 2560, 2560, Codes(8)) is None
    assert hadamard_launch(8, 20001, 1, Codes(8, "token")) is None
    assert hadamard_launch(8, 20001, 1, Codes(8)) is not None
    assert hadamard_launch(8, 768, 256, Codes(8, 100)) is None


def test_errors_say_what_was_expected():
    with pytest.raises(ValueError, match="block must divide 96, got 64"):
        hadamard_quantize(torch.zeros(1, 96), None, None, Codes(8), block=64, backend="triton")


def test_compiles_to_one_graph():
    x = torch.randn(4, 96)

    def run(x):
        return hadamard_quantize(x, None, None, Codes(4, "token"))[0]

    assert torch.equal(torch.compile(run, fullgraph=True, backend="eager")(x), run(x))


@pytest.mark.parametrize("granularity", ["token", 32])
def test_a_nan_is_seen_in_the_scale_of_its_token(granularity):
    x = torch.randn(3, 96)
    x[1, 40] = float("nan")
    for backend in ("triton", "reference"):
        _, scale = hadamard_quantize(
            x, None, None, Codes(8, granularity), block=32, backend=backend
        )
        assert scale[1].isnan().any() and not scale[[0, 2]].isnan().any()
