"""Parts from outside the package: how they are given, and that their answers are checked."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch

import qtk
from qtk.grids import Change
from qtk.integrations.transformers import record_of
from qtk.models import bert
from qtk.pipeline.recipes import Recipe
from qtk.ranges import Range, minmax
from qtk.round import Rounded, gptq, nearest, to_nearest
from qtk.transform import rotate, smoothquant

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return bert.tiny()


def quantize(tiny, **options):
    model, batch = tiny
    return qtk.quantize(model, calib=[batch], progress=False, **{"w": 4, "a": 8, **options})


def module_of(find, **members):
    module = ModuleType("somewhere.mine")
    for name, value in {"find": find, **members}.items():
        setattr(module, name, value)
    return module


class Counting:
    """A part with a state: rounds to nearest, and counts."""

    def __init__(self):
        self.problems = []

    def find(self, problem):
        self.problems.append(problem)
        return nearest.find(problem)


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("option, name, part", [
    ("rounding", "gptq", gptq), ("rounding", "gptq", gptq.find),
    ("rounding", "nearest", module_of(nearest.find)), ("rounding", "nearest", Counting()),
    ("method", "smoothquant", smoothquant), ("method", "rotate", rotate.find),
    ("ranges", "minmax", minmax), ("ranges", "minmax", lambda question: minmax.find(question)),
])  # fmt: skip
def test_a_part_may_be_a_module_an_object_or_a_function(tiny, option, name, part):
    assert same(quantize(tiny, **{option: part}), quantize(tiny, **{option: name}))


def test_the_record_has_the_parts_names_and_the_model_loads_without_them(tiny, tmp_path):
    def whole(question):
        return minmax.find(question)

    parts = {"rounding": partial(gptq.find, rounds=0), "ranges": whole, "method": smoothquant}
    qmodel = quantize(tiny, **parts)
    made = {str(layer.recipe) for layer in record_of(qmodel).layers.values()}
    assert made == {"smoothquant, gptq(rounds=0), whole", "none, gptq(rounds=0), whole"}
    assert record_of(qmodel).recipe["rounding"] == "gptq(rounds=0)"
    assert not same(qmodel, quantize(tiny, **{**parts, "rounding": "gptq"}))
    qmodel.save_pretrained(tmp_path)
    assert same(qtk.load(tmp_path), qmodel)


def test_an_object_sees_every_linear_with_its_name(tiny):
    part = Counting()
    qmodel = quantize(tiny, rounding=part, bits={"*.0.*": {"rounding": "gptq"}})
    names = [problem.name for problem in part.problems]
    assert len(names) == 6 and all(name.startswith("encoder.layer.1.") for name in names)
    assert all(name in dict(qmodel.named_modules()) for name in names)


def test_optional_members_are_those_of_the_module_or_of_the_functions_own(tiny):
    for part, needs_data in ((gptq, True), (gptq.find, True), (partial(gptq.find), True),
                             (nearest, False), (module_of(gptq.find), False),
                             (module_of(gptq.find, NEEDS_DATA=True), True)):  # fmt: skip
        assert Recipe.of(8, rounding=part).rounder.needs_data == needs_data
    assert Recipe.of(8, ranges=partial(minmax.find)).rule.tokens
    assert Recipe.of(8, method=rotate.find).transform.merge is rotate.merge


def rounder(change):
    """Rounds to nearest, and spoils codes or steps."""

    def broken(problem):
        codes, steps = to_nearest(problem.weight, problem.fmt)
        return change(codes, steps)

    return broken


BROKEN = {
    "codes a hundred times too large": (
        "rounding", rounder(lambda q, s: Rounded(q * 100, s)), "codes from .*, outside -8 to 7"),
    "codes between integers": ("rounding", rounder(lambda q, s: Rounded(q + 0.5, s)), "no int"),
    "codes of nan": ("rounding", rounder(lambda q, s: Rounded(q / 0, s)), "no int"),
    "codes of another shape": ("rounding", rounder(lambda q, s: Rounded(q.T, s)), "of shape"),
    "no steps": ("rounding", rounder(lambda q, s: (q, None)), "it must be codes and Steps"),
    "nothing": ("rounding", rounder(lambda q, s: None), "a NoneType where it must be codes"),
    "a scale of zero": (
        "rounding", rounder(lambda q, s: Rounded(q, replace(s, scale=s.scale * 0))), "than 0"),
    "scales of another shape": (
        "rounding", rounder(lambda q, s: Rounded(q, replace(s, scale=s.scale.T))), "scales that"),
    "a zero point where there is none": (
        "rounding", rounder(lambda q, s: Rounded(q, replace(s, zero_point=s.scale))), "a zero"),
    "a range the wrong way round": (
        "ranges", lambda q: Range(torch.tensor(1.0), torch.tensor(-1.0)), "lo=1.0 above hi=-1.0"),
    "a range of a vector": (
        "ranges", lambda q: Range(torch.ones(2), torch.ones(2)), "must be finite scalars"),
    "a range that is not finite": (
        "ranges", lambda q: Range(torch.tensor(-1.0), torch.tensor(float("inf"))), "be finite"),
    "a range of numbers": ("ranges", lambda q: Range(-1.0, 1.0), "must be finite scalars"),
    "a pair for a range": ("ranges", lambda q: (-1, 1), "it must give a Range"),
    "a shift of another width": (
        "method", lambda s, _: Change(torch.zeros(3), torch.ones(3)), "a shift of shape"),
    "a channel scale of zero": (
        "method", lambda s, _: Change(s.lo[0] * 0, s.lo[0] * 0), "not above zero for"),
    "a shift of nan": (
        "method", lambda s, _: Change(s.lo[0] * torch.nan, s.lo[0] * 0 + 1), "holds nan or inf"),
    "a tensor for a change": ("method", lambda s, _: s.lo, "it must be a Change"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_an_answer_that_breaks_the_contract_is_told_with_the_part(tiny, name):
    option, part, told = BROKEN[name]
    with pytest.raises(qtk.SchemeError, match=f"(?s){option}='.*{told}"):
        quantize(tiny, **{option: part})


@pytest.mark.parametrize("clip", [0.0, 1.5, -1, None, torch.ones(2), float("nan")])
def test_a_clip_that_is_no_share_is_told_with_the_part(tiny, clip):
    part = module_of(lambda question: Range(clip=clip), TOKENS=True)
    with pytest.raises(qtk.SchemeError, match=r"ranges='mine' gave clip=.*, not in \(0, 1\]"):
        quantize(tiny, ranges=part, activations="token")


def test_an_asymmetric_grid_wants_zero_points(tiny):
    def symmetric(problem):
        codes, steps = to_nearest(problem.weight, replace(problem.fmt, symmetric=True))
        return Rounded(codes, replace(steps, fmt=problem.fmt))

    with pytest.raises(qtk.SchemeError, match="gave no zero point for encoder"):
        quantize(tiny, a=16, weights="asymmetric", rounding=symmetric)


@pytest.mark.parametrize("option", ["rounding", "method", "ranges"])
@pytest.mark.parametrize("given", [3, [], module_of(None)])
def test_what_is_no_part_is_refused(tiny, option, given):
    with pytest.raises(qtk.SchemeError, match="give a name, a module with a function `find`"):
        quantize(tiny, **{option: given})


def test_code_in_contributing_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        assert len(block.splitlines()) <= 50
        exec(compile(block, "CONTRIBUTING.md", "exec"), {"__name__": "contributing"})
    assert "8 made with os+, stochastic, minmax" in capsys.readouterr().out
