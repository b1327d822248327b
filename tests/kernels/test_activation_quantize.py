import pytest
import torch

from qtk_kernels.codes import Codes
from qtk_kernels.shift_scale_quantize import shift_scale_quantize

EXACT = {
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x * 2**-0.5)),
    "gelu_tanh": lambda x: (
        0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    ),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": lambda x: x.clamp(min=0),
    "silu": lambda x: x * torch.sigmoid(x),
}


def inputs(*shape, dtype=torch.float32):
    x = (torch.randn(shape) * 3).to(dtype)
    return x, torch.rand(shape[-1]) * 20, torch.randn(shape[-1])


@pytest.mark.parametrize("backend", ["triton", "cpu", "reference"])
@pytest.mark.parametrize("activation", EXACT)
@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 197), (9, 1025)], ids=str)
def test_codes_round_the_exact_value(activation, shape, backend, assert_codes_agree):
    """erf and tanh are good to 2**-21 of |x|, product and sum to one rounding each."""
    x, multiplier, offset = inputs(*shape)
    q, _ = shift_scale_quantize(
        x, multiplier, offset, Codes(8), activation=activation, backend=backend
    )
    exact = EXACT[activation](x.double()) * multiplier + offset
    tolerance = 2.0**-21 * (x.abs() * multiplier + offset.abs() + exact.abs())
    assert_codes_agree(q, exact.round().clamp(-128, 127), exact, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("granularity", ["tensor", "token", 64])
def test_relu_equals_reference(dtype, granularity):
    args = inputs(5, 130, dtype=dtype)
    codes = Codes(8, granularity, offset=128)
    want = shift_scale_quantize(*args, codes, activation="relu", backend="reference")
    got = shift_scale_quantize(*args, codes, activation="relu", backend="triton")
    assert torch.equal(got[0], want[0])
    assert got[1] is want[1] is None or torch.equal(got[1], want[1])


@pytest.mark.parametrize("activation", EXACT)
def test_scale_of_a_token(activation):
    """The largest magnitude is good to 2**-21 of the largest input."""
    x, multiplier, offset = inputs(6, 197)
    for backend in ("triton", "reference"):
        _, scale = shift_scale_quantize(
            x, multiplier, offset, Codes(8, "token"), activation=activation, backend=backend
        )
        exact = EXACT[activation](x.double()) * multiplier + offset
        tolerance = 2.0**-20 * (x.abs() * multiplier + offset.abs()).amax(-1, keepdim=True)
        assert ((scale * 127 - exact.abs().amax(-1, keepdim=True)).abs() <= tolerance).all()


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("activation", EXACT)
def test_every_value_to_its_last_bits(activation, backend):
    """Groups of one channel: each scale is |y| / 127."""
    x = torch.linspace(-6, 6, 256).unsqueeze(0)
    _, scale = shift_scale_quantize(
        x, None, None, Codes(8, 1), activation=activation, backend=backend
    )
    exact = EXACT[activation](x.double()).abs()
    assert ((scale * 127 - exact).abs() <= 2.0**-21 * x.abs() + 1e-8).all()


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu", "silu"])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_far_ends_are_the_identity_and_zero(activation, backend):
    x = torch.tensor([[-1e4, -40.0, 0.0, 40.0, 1e4]])
    q, _ = shift_scale_quantize(x, None, None, Codes(8), activation=activation, backend=backend)
    assert q.tolist() == [[0, 0, 0, 40, 127]]


def test_input_is_not_overwritten():
    x = torch.randn(3, 8)
    before = x.clone()
    shift_scale_quantize(x, None, None, Codes(8), activation="relu")
    assert torch.equal(x, before)


def test_unknown_activation_lists_what_there_is():
    with pytest.raises(ValueError, match=r"unknown activation 'mish', expected one of .*gelu_tanh"):
        shift_scale_quantize(torch.zeros(1, 8), None, None, Codes(8), activation="mish")


def test_compiles_to_one_graph():
    x, multiplier, offset = inputs(4, 130)

    def run(x):
        return shift_scale_quantize(x, multiplier, offset, Codes(8), activation="gelu")[0]

    assert torch.equal(torch.compile(run, fullgraph=True, backend="eager")(x), run(x))
