import pytest

from qtk.errors import SchemeError
from qtk.recipes import PRESETS, Recipe


@pytest.mark.parametrize("preset", [None, *PRESETS])
@pytest.mark.parametrize("a", [4, 6, 8, 16])
def test_every_preset_names_parts_that_exist(preset, a):
    recipe = Recipe.of(a, preset=preset)
    assert recipe.rounding and recipe.ranges


def test_what_is_given_wins_over_the_preset():
    recipe = Recipe.of(4, method="smoothquant", rounding="nearest", preset="best")
    assert (recipe.method, recipe.rounding) == ("smoothquant", "nearest")


def test_public_names_lead_to_files():
    assert Recipe.of(8, "os+").method == "outlier_suppression"
    assert Recipe.of(8, "none").method is None


def test_narrow_activations_are_rotated_and_wide_ones_are_not():
    assert Recipe.of(4).public_method == "equalize+rotate"
    assert Recipe.of(8).method == "outlier_suppression"


def test_auto_ranges_keep_norms_whole_unless_rotated():
    recipe = Recipe.of(8)
    assert recipe.range_rule(reads_norm=True, rotated=False) == "minmax"
    assert recipe.range_rule(reads_norm=True, rotated=True) == "weighted_mse"
    assert recipe.range_rule(reads_norm=False, rotated=False) == "weighted_mse"


@pytest.mark.parametrize("wrong", [{"method": "os"}, {"rounding": "up"}, {"ranges": "all"},
                                   {"preset": "great"}])  # fmt: skip
def test_a_wrong_name_lists_the_right_ones(wrong):
    with pytest.raises(SchemeError, match="choose"):
        Recipe.of(8, **wrong)
