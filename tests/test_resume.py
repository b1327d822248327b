"""A run that is killed goes on from its last finished block, and ends with the same bytes."""

import random
import shutil
import time
from functools import cache
from pathlib import Path

import pytest
import torch

import qtk
from qtk import pipeline
from qtk.learn import block, model
from qtk.pipeline.state import discard
from tests.kills import killed_after, killed_before
from tests.test_integrity import states
from tests.zoo import build

RECIPES = {
    "gptq": {"w": 4, "a": 8},
    "no data": {"w": 4, "a": 8, "calib": None},
    "rotated": {"w": 4, "a": 4, "method": "rotate"},
    "attention": {"attention": "int8", "softmax": "matthew"},
    "hessian": {"w": 8, "a": 4, "ranges": "hessian", "rounding": "nearest"},
    "auto bits": {"w": 3, "a": 4, "bits": "auto:0.3"},
    "a block in floats": {"skip": ["*.1.*"]},
    "block": {"w": 4, "a": 4, "rounding": "block"},
    "tuned": {"w": 4, "a": 4, "rounding": "tuned"},
}


@cache
def float_model():
    return build("OPTForCausalLM")


def run(out: Path, state: Path | None, **options) -> None:
    source, batch = float_model()
    options = {"calib": [batch, batch], "progress": False, **options}
    qtk.quantize(source, resume=state, **options).save_pretrained(out)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """Learning takes a few steps instead of some hundred."""
    for module, steps in ((block, 4), (model, 12)):
        name = f"learn_{module.__name__.rpartition('.')[2]}"
        learn = getattr(module, name)
        monkeypatch.setattr(
            f"qtk.pipeline.learning.{name}",
            lambda *args, learn=learn, steps=steps: learn(*args, steps=steps),
        )


@pytest.fixture
def whole(tmp_path):
    """What an undisturbed run leaves."""

    def of(**options):
        run(tmp_path / "whole", None, **options)
        return states(tmp_path / "whole")

    return of


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_killed_while_it_keeps_something_ends_with_the_same_bytes(recipe, tmp_path, whole):
    options, state, out = RECIPES[recipe], tmp_path / "state", tmp_path / "out"
    wanted = whole(**options)
    for count in (2, 9):  # the state is begun, and a block is written
        killed_before(count, state, lambda: run(out, state, **options))
    run(out, state, **options)
    assert states(out) == wanted


@pytest.mark.parametrize("recipe", ["gptq", "no data", "block"])
def test_only_the_unfinished_block_is_made_again(recipe, tmp_path, whole, monkeypatch):
    options, state = RECIPES[recipe], tmp_path / "state"
    wanted, sites = whole(**options), []
    quantize_site = pipeline.quantize_site

    def counted(qmodel, site, *args):
        if len(sites) == 6:
            raise KeyboardInterrupt
        sites.append(site.name)
        return quantize_site(qmodel, site, *args)

    monkeypatch.setattr(pipeline, "quantize_site", counted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", state, **options)
    assert len(sites) == 6 and [p.name for p in state.glob("block-*")] == ["block-0.safetensors"]
    sites[:] = [""]  # one more than the four of the second block would be too many
    run(tmp_path / "out", state, **options)
    assert len(sites) == 5 and all(".1," in name for name in sites[1:])
    assert states(tmp_path / "out") == wanted
    sites[:] = []
    run(tmp_path / "out", state, **options)
    assert not sites


@pytest.mark.parametrize("change", [
    {"w": 3}, {"seed": 1}, {"preset": "fast"}, {"skip": ["*.0.*"]}, {"backend": "reference"},
    {"calib": [{"input_ids": torch.tensor([[5, 6, 7]])}]},
], ids=str)  # fmt: skip
def test_a_state_of_another_run_is_refused(change, tmp_path):
    run(tmp_path / "out", tmp_path / "state", w=4)
    with pytest.raises(qtk.CheckpointError, match="is of another model, data, seed or scheme"):
        run(tmp_path / "out", tmp_path / "state", **{"w": 4, **change})


def test_a_state_of_another_model_is_refused(tmp_path):
    run(tmp_path / "out", tmp_path / "state")
    other, batch = build("OPTForCausalLM")
    with torch.no_grad():
        other.model.decoder.layers[1].fc1.weight[0, 0] += 1e-3
    with pytest.raises(qtk.CheckpointError, match="another model"):
        qtk.quantize(other, calib=[batch, batch], resume=tmp_path / "state", progress=False)


def test_a_damaged_block_is_named_and_other_files_are_not_touched(tmp_path):
    state = tmp_path / "state"
    run(tmp_path / "out", state)
    file = state / "block-1.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(qtk.CheckpointError, match=r"block-1.*is not what was saved.*delete it"):
        run(tmp_path / "out", state)
    file.unlink()
    run(tmp_path / "again", state)
    assert states(tmp_path / "again") == states(tmp_path / "out")
    (state / "notes.txt").write_text("mine")
    discard(state)
    assert [path.name for path in state.iterdir()] == ["notes.txt"]
    with pytest.raises(qtk.CheckpointError, match="holds other files"):
        run(tmp_path / "out", state)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["gptq", "tuned"])
def test_twenty_kills_at_random(recipe, tmp_path, whole):
    options, draw = RECIPES[recipe], random.Random(0)
    began = time.monotonic()
    wanted = whole(**options)
    seconds = time.monotonic() - began
    for i in range(20):
        state, out = tmp_path / f"state-{i}", tmp_path / f"out-{i}"
        killed_after(draw.uniform(0, seconds), lambda s=state, o=out: run(o, s, **options))
        run(out, state, **options)
        assert states(out) == wanted, f"kill {i}"
        shutil.rmtree(out)
