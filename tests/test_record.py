"""What a checkpoint says of itself is believed field by field, or refused with the field's name."""

import copy
import json

import pytest
import torch

import qtk
from qtk.integrations.transformers import record_of
from qtk.models import bert
from qtk.record import Layer, LayerRecipe, Record
from qtk.scheme import AttentionScheme, Scheme

SCHEMES = [Scheme.of(8, 8), Scheme.of("fp8", "fp8"), Scheme.of(3, 6, "token"),
           Scheme.of(4, 16, group_size=32, weights="asymmetric")]  # fmt: skip
RECIPE = {
    "method": "os+", "rounding": "gptq", "ranges": "auto", "w": 8, "a": 8, "seed": -3,
    "calibration_batches": 2,
    "learning": {"of": "model", "changed": True, "held_out_loss": [[0.5, 0.25], [None, 1]]},
}  # fmt: skip


def record():
    made = LayerRecipe("os+", "gptq", None)
    layers = {
        f"layer.{i}": Layer(scheme, True, False, i == 1, 30.5, made)
        for i, scheme in enumerate(SCHEMES)
    }
    return Record(layers, RECIPE, "cpu", AttentionScheme(8, "code", 7))


def data():
    return json.loads(json.dumps(record().to_dict()))


def test_a_record_survives_json():
    assert Record.from_dict(data()) == record()


def test_what_quantize_writes_is_read_back():
    torch.manual_seed(0)
    model, batch = bert.tiny()
    for options in (
        {},
        {"attention": "int8"},
        {"w": "fp8", "a": "fp8"},
        {"rounding": "tuned", "w": 4, "a": 4},
    ):
        made = record_of(qtk.quantize(model, calib=[batch], progress=False, **options))
        assert Record.from_dict(json.loads(json.dumps(made.to_dict()))) == made


def at(path):
    def change(value):
        found = data()
        place = found
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        return found

    return change


def paths(value, before=()):
    """Of every field, however deep."""
    for key in value if isinstance(value, dict) else range(len(value)):
        yield (*before, key)
        if isinstance(value[key], (dict, list)):
            yield from paths(value[key], (*before, key))


def nested(depth):
    value = {}
    for _ in range(depth):
        value = {"a": value}
    return value


ODD = [
    None, True, False, -1, 0, 1, 9, 10**400, -(10**400), 1.5, 1e300, float("nan"), float("inf"), "",
    "x", "x" * 5000, [], [1], [[1, 2, 3]], {}, {"a": 1}, nested(300),
]  # fmt: skip


@pytest.mark.parametrize("path", paths(data()), ids=lambda path: ".".join(map(str, path)))
def test_any_value_in_any_field_is_believed_or_refused(path):
    """Nothing else is raised, and what is believed is written as it was read."""
    for value in ODD:
        changed = at(path)(value)
        try:
            read = Record.from_dict(copy.deepcopy(changed))
        except qtk.CheckpointError as error:
            assert len(str(error)) < 400
        else:
            again = read.to_dict()
            assert {**again, "version": changed["version"]} == {"attention": None, **changed} or (
                changed.get("attention") is None and again == {
                    k: v for k, v in {**changed, "version": 3}.items() if k != "attention"
                }
            )  # fmt: skip


@pytest.mark.parametrize("value, told", [
    ({"sqnr": 10**400}, r"layer\.0': sqnr is a huge integer, it must be a number of dB or null"),
    ({"sqnr": "x"}, "sqnr is 'x'"),
    ({"rotation": "no"}, "rotation is 'no', it must be true or false"),
    ({"bias": 1}, "bias is 1"),
    ({"recipe": {"method": "os+"}}, "recipe has no rounding"),
    ({"recipe": 3}, "recipe is 3"),
    ({"new": 1}, "has a field 'new', which this qtk does not know"),
    ({"scheme": {"w": None, "a": None}}, "weight is in floating point"),
    ({"scheme": {"w": []}}, "a scheme has w and a"),
    ({"scheme": {"w": {"bits": 16}, "a": None}}, "bits of w: choose 2 to 8"),
    ({"scheme": {"w": {"bits": 8, "symmetric": "yes"}, "a": None}}, "symmetric='yes'"),
    ({"scheme": {"w": {"bits": 8, "granularity": "channel", "group_size": 0}, "a": None}},
     "group_size=0"),
])  # fmt: skip
def test_a_layer_is_refused_with_its_name_and_field(value, told):
    changed = data()
    changed["layers"]["layer.0"].update(value)
    with pytest.raises(qtk.CheckpointError, match=told):
        Record.from_dict(changed)


@pytest.mark.parametrize("value, told", [
    ({"version": True}, "names no version"), ({"version": 10**400}, "of layout a huge integer"),
    ({"layers": []}, "layers is a list of 0"), ({"layers": {"": {}}}, "layers is an object of 1"),
    ({"layers": {}, "attention": None}, "lists no layers"), ({"backend": "cuda"}, "one of auto"),
    ({"recipe": {"how": 1}}, "has a field 'how'"), ({"must_understand": 1}, "a newer one may"),
    ({"recipe": {"learning": {"of": "model"}}}, "learning has no changed"),
    ({"recipe": {"learning": {**RECIPE["learning"], "held_out_loss": [1]}}}, "pairs of numbers"),
    ({"attention": {"bits": 3, "softmax": "code", "softmax_bits": 7}}, "badly: attention in 3"),
    ({"attention": {"softmax": ["code"]}}, "softmax is a list of 1"),
    ({"attention": {"softmax": "code"}}, "attention has no bits"),
    ({"attention": 5}, "attention is 5"),
])  # fmt: skip
def test_a_record_is_refused_with_its_field(value, told):
    with pytest.raises(qtk.CheckpointError, match=told):
        Record.from_dict({**data(), **value})


@pytest.mark.parametrize("version", [1, 2])
def test_older_layouts_are_read(version):
    """1 knows linears alone, 2 attention; neither a layer's own recipe, nor what was learned."""
    old = {**data(), "version": version}
    for layer in old["layers"].values():
        del layer["recipe"]
    del old["recipe"]["learning"]
    if version == 1:
        del old["attention"]
    read = Record.from_dict(old)
    assert [layer.scheme for layer in read.layers.values()] == SCHEMES
    assert all(layer.recipe is None for layer in read.layers.values())
    assert (read.attention is None) == (version == 1)
