import pytest
import torch

from qtk.errors import SchemeError
from qtk.grids import Change, InputGrid, LinearSpec, Steps
from qtk.modules.linear import QuantLinear
from qtk.numerics import scale_and_zero_point
from qtk.scheme import Format, Scheme


def a_spec(scheme: Scheme, change: Change, K=24, N=5) -> LinearSpec:
    torch.manual_seed(0)
    codes = torch.randint(-8, 8, (N, K), dtype=torch.int8)
    G = 1 if scheme.w.group_size is None else -(-K // scheme.w.group_size)
    zero_point = None if scheme.w.symmetric else torch.randint(-3, 4, (N, G)).float()
    steps = Steps(scheme.w, torch.randn(N, G), zero_point)
    grid = InputGrid(scheme.a, change)
    if scheme.a is not None and scheme.a.granularity == "tensor":
        scale, zero_point = scale_and_zero_point(torch.tensor(-3.0), torch.tensor(4.0), scheme.a)
        grid = InputGrid(scheme.a, change, scale, zero_point)
    return LinearSpec(codes, steps, grid, torch.randn(N))


CHANGES = {
    "none": Change(),
    "scaled": Change(torch.linspace(-1, 1, 24), torch.linspace(0.5, 2, 24)),
    "rotated": Change(rotation=True),
    "both": Change(torch.linspace(-1, 1, 24), torch.linspace(0.5, 2, 24), rotation=True),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("options", [(4, 8), (4, 8, "token"), (4, 16, "static", 8, "asymmetric")])
def test_a_layer_gives_back_the_value_it_was_made_of(change, options):
    spec = a_spec(Scheme.of(*options), CHANGES[change])
    again = QuantLinear.from_spec(spec).spec()
    assert torch.equal(again.codes, spec.codes) and again.scheme == spec.scheme
    assert torch.equal(again.weight(), spec.weight()) and torch.equal(again.bias, spec.bias)
    x = torch.randn(7, 24)
    assert torch.equal(again.reference(x), spec.reference(x))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("options", [(4, 8), (4, 8, "token"), (4, 16, "static", 8, "asymmetric")])
def test_the_reference_of_a_value_is_what_its_layer_computes(change, options):
    spec = a_spec(Scheme.of(*options), CHANGES[change])
    x = torch.randn(7, 24)
    got, wanted = QuantLinear.from_spec(spec, "reference")(x), spec.reference(x)
    # both sum K products of float32 values: the order of the sum is what they may differ in
    size = spec.grid.fake_quantize(x).abs() @ spec.weight().abs().T
    assert ((got - wanted).abs() <= 24 * 2**-22 * size + 1e-6).all()


@pytest.mark.parametrize("change", CHANGES)
def test_the_float_weight_of_a_value_undoes_the_change_of_variable(change):
    spec = a_spec(Scheme.of(4, 16), CHANGES[change])
    x = torch.randn(7, 24)
    plain = x @ spec.float_weight().T + spec.float_bias()
    assert torch.allclose(plain, spec.reference(x), rtol=1e-4, atol=1e-4)


def test_a_change_has_both_vectors_or_neither():
    with pytest.raises(SchemeError, match="both shift and channel_scale"):
        Change(shift=torch.zeros(3))


def test_vectors_that_do_nothing_are_left_out():
    assert Change(torch.zeros(3), torch.ones(3), True).simplest() == Change(rotation=True)
    kept = Change(torch.zeros(3), torch.full((3,), 2.0))
    assert kept.simplest() is kept


def test_weights_without_an_input_grid_are_weight_only():
    assert a_spec(Scheme(Format(4), None), Change()).scheme == Scheme.of(4, 16)
