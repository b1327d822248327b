import pytest

from qtk.errors import SchemeError
from qtk.scheme import ACTIVATION_BITS, WEIGHT_BITS, Format, Scheme


def test_names_say_what_they_are():
    assert Scheme.of(8, 8).name == "W8A8"
    assert Scheme.of(4, 16, group_size=128).name == "W4A16 g128"
    assert Scheme.of(4, 4, "token").name == "W4A4 token"
    assert Scheme.of(4, 16, group_size=64, weights="asymmetric").name == "W4A16 g64 asymmetric"
    assert Scheme.of(16, 16).name == "float"


@pytest.mark.parametrize("w", WEIGHT_BITS)
@pytest.mark.parametrize("a", [*ACTIVATION_BITS, 16])
@pytest.mark.parametrize("activations", ["static", "token"])
@pytest.mark.parametrize("weights", ["symmetric", "asymmetric"])
def test_round_trip_through_a_dict(w, a, activations, weights):
    if weights == "asymmetric" and a != 16:
        with pytest.raises(SchemeError, match="zero point"):
            Scheme.of(w, a, activations, weights=weights)
        return
    scheme = Scheme.of(w, a, activations, group_size=32, weights=weights)
    assert Scheme.from_dict(scheme.to_dict()) == scheme


def test_a_grid_has_all_codes():
    assert (Format(8).qmin, Format(8).qmax) == (-128, 127)
    assert (Format(4, symmetric=False).qmin, Format(4, symmetric=False).qmax) == (-8, 7)


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"w": {"bits": 99}, "a": None},
        {"w": {"bats": 4}, "a": None},
        {"w": {"bits": 4, "symmetric": False}, "a": {"bits": 8, "granularity": "token"}},
    ],
)
def test_a_bad_dict_is_refused(data):
    with pytest.raises(SchemeError):
        Scheme.from_dict(data)
