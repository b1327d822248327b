"""No option is ignored: each of a pair changes the bits, or is refused, or stands in a table here.

The model is so small that quantizing it takes a fraction of a second, and its channels differ as
much as real ones do, so that two rules find two ranges.
"""

import hashlib
import itertools
from functools import partial

import pytest
import torch
import transformers

import qtk
from qtk.discover import load
from qtk.integrations.transformers import record_of
from qtk.learn.block import learn_block
from qtk.learn.model import learn_model
from qtk.pipeline.recipes import LEARNING, PRESETS

VALUES = {
    "w": [8, 16],
    "a": [8, 16],
    "method": ["os+", "smoothquant", "rotate", "os+rotate", "equalize+rotate", "none"],
    "rounding": ["nearest", "gptq", "adaround", "flexround", "flipped", "block", "tuned"],
    "ranges": [
        "auto", "minmax", "mse", "weighted_mse", "percentile", "averaged", "tokenwise", "hessian",
    ],
    "preset": ["fast", "best"],
    "activations": ["token"],
    "weights": ["asymmetric"],
    "group_size": [8],
    "attention": ["int8"],
    "softmax": ["uniform", "matthew", "log2", "code"],
    "softmax_bits": [2],
    "bits": ["auto:0.4"],
    "calib": [None],
}  # fmt: skip
CASES = [(option, value) for option, values in VALUES.items() for value in values]
SEARCHED = {"minmax", "mse", "weighted_mse", "percentile", "tokenwise", "hessian"}

# Where an option may give the bits that there are without it: a test on (option, value, what the
# preset says without it, what it says with it, activation bits), and the reason.
EQUIVALENT = [
    (
        lambda option, value, before, after, a: option in PRESET and before == after,
        "what the preset fills in, said aloud; or a preset of which nothing is left",
    ),
    (
        lambda option, value, before, after, a:
            (option, value) == ("rounding", "gptq") and before["rounding"] in LEARNING,
        "what learning starts from, and what it keeps where held-out data does not confirm",
    ),
    (
        lambda option, value, before, after, a:
            value in ("mse", "weighted_mse") and "rotate" in after["method"],
        "'auto' weighs errors after a rotation, and there all channels weigh nearly the same",
    ),
    (
        lambda option, value, before, after, a:
            value in SEARCHED and after["method"] == "os+" and a == 8,
        "channels that OS+ has levelled end together: in 8 bits nothing is gained by clipping them",
    ),
    (
        lambda option, value, before, after, a:
            value == "percentile" and after["method"] == "os+" and before["ranges"] == "minmax",
        "the same in 4 bits: the outermost values are many, and equal",
    ),
    (
        lambda option, value, before, after, a: (option, value, a) == ("ranges", "minmax", 16),
        "inputs that stay in floating point are clipped nowhere",
    ),
    (
        lambda option, value, before, after, a: (option, a) == ("activations", None),
        "without data activations are dynamic anyway, and a warning says so",
    ),
]  # fmt: skip
PRESET = ("method", "rounding", "ranges", "preset")


def preset_of(options):
    """What the preset says for the options' activations, and they themselves where they say."""
    a = options.get("a", 4)
    width = "float" if a == 16 else "wide" if a == 8 else "narrow"
    said = PRESETS[options.get("preset", "balanced")][width]
    said = dict(zip(("method", "rounding", "ranges"), said, strict=True))
    return {**said, **{key: options[key] for key in said if key in options}}


def equivalent(option, value, others):
    """Why an option rightly gives the same bits as without it; None where it must not."""
    before, after = preset_of(others), preset_of({**others, option: value})
    a = None if "calib" in others else others.get("a", 4)
    return next((why for test, why in EQUIVALENT if test(option, value, before, after, a)), None)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        num_hidden_layers=1, hidden_size=16, num_attention_heads=2, intermediate_size=32,
        vocab_size=99, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.BertModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
                parameter[:, ::3] *= 4  # channels that matter more than others
            else:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.fixture(scope="module")
def fingerprint(model):
    """Of the model that options give: a hash of its tensors and output, or why they are refused."""
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 99, (2, 9), generator=generator) for _ in range(3)]
    calib = [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in ids]
    found = {}

    def of(options):
        key = tuple(sorted((k, str(v)) for k, v in options.items()))
        if key not in found:
            found[key] = compute(options)
        return found[key]

    def compute(options):
        try:
            options = {"w": 4, "a": 4, "calib": calib, "progress": False, **options}
            qmodel = qtk.quantize(model, **options)
        except qtk.QtkError as error:
            return f"refused: {error}", True
        with torch.no_grad():
            tensors = {**qmodel.state_dict(), "output": qmodel(**calib[0])[0]}
        digest = hashlib.sha256()
        for name, value in tensors.items():
            digest.update(name.encode() + value.contiguous().numpy().tobytes())
        learning = record_of(qmodel).recipe["learning"]
        return digest.hexdigest(), learning is None or learning["changed"]

    return of


@pytest.fixture(scope="module", autouse=True)
def _few_steps():
    """Of everything that iterates: what is asked is whether it does anything."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("adaround", "flexround", "flipped"):
            part = load("round", name)
            patch.setattr(part, "find", partial(part.find, iterations=5))
        patch.setattr("qtk.pipeline.learning.learn_block", partial(learn_block, steps=4))
        patch.setattr("qtk.pipeline.learning.learn_model", partial(learn_model, steps=4))
        yield


def test_no_option_is_ignored(fingerprint):
    ignored = []
    for first, second in itertools.combinations(CASES, 2):
        if first[0] == second[0]:
            continue
        both, confirmed = fingerprint(dict([first, second]))
        if both.startswith("refused"):
            continue
        for (option, value), other in ((first, second), (second, first)):
            others = dict([other])
            if (
                fingerprint(others)[0] == both
                and confirmed
                and not equivalent(option, value, others)
            ):
                ignored.append(f"{option}={value!r} with {other[0]}={other[1]!r}")
    assert not ignored, "\n".join(ignored)


@pytest.mark.parametrize("activations", ["static", "token"])
def test_every_rule_finds_a_range_of_its_own(fingerprint, activations):
    """In four bits, where clipping pays, and with the channels as they are."""
    calib = [{"input_ids": torch.randint(3, 99, (16, 16))} for _ in range(2)]
    rules = [rule for rule in VALUES["ranges"] if rule != "auto"]
    options = {"method": "none", "activations": activations, "calib": calib}
    prints = {rule: fingerprint({**options, "ranges": rule})[0] for rule in rules}
    refused = [rule for rule in rules if prints[rule].startswith("refused")]
    assert refused == ([] if activations == "static" else ["averaged", "tokenwise"])
    if activations == "token":
        del prints["hessian"]  # finds in 14 steps what weighted_mse does, on so few tokens
    assert len(set(prints.values())) == len(prints)
