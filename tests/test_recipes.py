import pytest

from qtk.errors import SchemeError
from qtk.pipeline.recipes import PRESETS, Recipe


@pytest.mark.parametrize("preset", [None, *PRESETS])
@pytest.mark.parametrize("a", [4, 6, 8, 16])
def test_every_preset_names_parts_that_exist(preset, a):
    recipe = Recipe.of(a, preset=preset)
    assert recipe.method and recipe.rounder.name and recipe.ranges


def test_what_is_given_wins_over_the_preset():
    recipe = Recipe.of(4, method="smoothquant", rounding="nearest", preset="best")
    assert (recipe.method, recipe.rounder.name) == ("smoothquant", "nearest")
    assert recipe.learn is None


def test_public_names_lead_to_files():
    assert Recipe.of(8, "os+").transform.name == "outlier_suppression"
    assert Recipe.of(8, "none").transform.find is not None
    for name in ("os+", "os+rotate", "equalize+rotate", "rotate", "none"):
        assert Recipe.of(8, name).method == name


def test_narrow_activations_are_rotated_and_wide_ones_are_not():
    assert Recipe.of(4).method == "equalize+rotate"
    assert Recipe.of(8).method == "os+"


def test_auto_ranges_keep_norms_whole_unless_rotated():
    recipe = Recipe.of(8)
    assert recipe.rule_for(reads_norm=True, rotated=False).name == "minmax"
    assert recipe.rule_for(reads_norm=True, rotated=True).name == "weighted_mse"
    assert recipe.rule_for(reads_norm=False, rotated=False).name == "weighted_mse"


def test_tuned_and_block_are_a_start_and_what_learns_from_it():
    for rounding, learn in (("tuned", "model"), ("block", "block")):
        recipe = Recipe.of(4, rounding=rounding)
        assert (recipe.rounder.name, recipe.learn) == ("gptq", learn)
        assert recipe == Recipe.of(4, rounding="gptq", learn=learn)
        with pytest.raises(SchemeError, match="give one of the two"):
            Recipe.of(4, rounding=rounding, learn="none")
    assert Recipe.of(4, preset="best").learn == "model"
    assert Recipe.of(4, preset="best", learn="none").learn is None
    assert Recipe.of(4, rounding="adaround", learn="model").learn == "model"


@pytest.mark.parametrize("wrong", [{"method": "os"}, {"rounding": "up"}, {"ranges": "all"},
                                   {"preset": "great"}, {"learn": "all"}])  # fmt: skip
def test_a_wrong_name_lists_the_right_ones(wrong):
    with pytest.raises(SchemeError, match="choose"):
        Recipe.of(8, **wrong)
