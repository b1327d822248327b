"""Padding left out: the tokens that count keep their bits, the rest leave as zeros."""

import pytest
import torch

import qtk
from qtk.discover import load
from qtk.modules import attention
from qtk.modules.fused import packing
from tests.test_families import FUSED
from tests.zoo import build

LENGTHS = (5, 11, 1, 17, 3)
SCHEMES = {
    "W8A8": {"w": 8, "a": 8, "preset": "fast"},
    "W7A8 token": {"w": 7, "a": 8, "activations": "token", "preset": "fast"},
    "W4A4 rotated": {"w": 4, "a": 4, "preset": "fast", "method": "rotate"},
    "attention": {"w": 8, "a": 8, "attention": "int8", "softmax": "matthew", "preset": "fast"},
}


def padded(left=False, lengths=LENGTHS):
    drawn = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 99, (len(lengths), max(lengths)), generator=drawn)
    place = torch.arange(ids.shape[1])
    mask = place < torch.tensor(lengths)[:, None]
    mask = mask.flip(1) if left else mask
    return {"input_ids": ids, "attention_mask": mask.long()}


@torch.no_grad()
def both(qmodel, batch, monkeypatch):
    """Hidden states, packed and padded, and how many tokens the blocks computed on."""
    seen = []
    pack = packing.Packing.pack

    def counted(self, x):
        seen.append(pack(self, x).shape[:2].numel())
        return pack(self, x)

    monkeypatch.setattr(packing.Packing, "pack", counted)
    got = qmodel(**batch)[0]
    monkeypatch.undo()
    monkeypatch.setattr(
        "qtk.modules.fused.block.packing_of", lambda x, *_: packing.Packing(*x.shape[:2])
    )
    wanted = qmodel(**batch)[0]
    monkeypatch.undo()
    return got, wanted, set(seen)


def assert_same_where_seen(got, wanted, batch):
    seen = batch["attention_mask"].bool()
    assert torch.equal(got[seen], wanted[seen])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_tokens_that_count_keep_their_bits(scheme, backend, monkeypatch):
    model, _ = build("BertModel")
    options = {**SCHEMES[scheme], "backend": backend}
    qmodel = qtk.quantize(model, calib=[padded()], progress=False, **options)
    got, wanted, sizes = both(qmodel, padded(), monkeypatch)
    assert sizes == {sum(LENGTHS)}
    assert_same_where_seen(got, wanted, padded())
    assert (got[~padded()["attention_mask"].bool()] == 0).all()


@pytest.mark.parametrize(
    "family", [f for f in FUSED if f != "opt" and "input_ids" in load("models", f).tiny()[1]]
)
def test_every_family_of_sentences(family, monkeypatch):
    model, batch = load("models", family).tiny()
    qmodel = qtk.quantize(model, 8, 8, calib=[batch], preset="fast", progress=False)
    batch = padded(lengths=(2, 7, 1, 8))
    got, wanted, _ = both(qmodel, batch, monkeypatch)
    assert_same_where_seen(got, wanted, batch)


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_decoder_with_padding_on_either_side(left, use_cache, monkeypatch):
    model, _ = build("OPTForCausalLM")
    batch = padded(left)
    qmodel = qtk.quantize(model, 8, 8, calib=[batch], preset="fast", progress=False)
    qmodel.config.use_cache = use_cache
    got, wanted, sizes = both(qmodel, batch, monkeypatch)
    assert sizes == {sum(LENGTHS)}
    assert_same_where_seen(got, wanted, batch)


def test_generating_after_left_padding(monkeypatch):
    model, _ = build("OPTForCausalLM")
    batch = padded(left=True)
    qmodel = qtk.quantize(model, 8, 8, calib=[batch], preset="fast", progress=False)
    tokens = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 1}
    got = qmodel.generate(**batch, **tokens)
    monkeypatch.setattr(
        "qtk.modules.fused.block.packing_of", lambda x, *_: packing.Packing(*x.shape[:2])
    )
    assert torch.equal(got, qmodel.generate(**batch, **tokens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_masks_of_bools_and_of_floats(implementation, dtype, monkeypatch):
    model, _ = build("BertModel", dtype)
    qmodel = qtk.quantize(model, 8, 8, calib=[padded()], preset="fast", progress=False)
    qmodel.set_attn_implementation(implementation)
    got, wanted, sizes = both(qmodel, padded(), monkeypatch)
    assert sizes == {sum(LENGTHS)}
    assert_same_where_seen(got, wanted, padded())


def test_without_enough_padding_nothing_is_moved(monkeypatch):
    model, _ = build("BertModel")
    qmodel = qtk.quantize(model, 8, 8, calib=[padded()], preset="fast", progress=False)
    for lengths in ((17, 16), (17,), (9, 9)):
        batch = padded(lengths=lengths)
        got, wanted, sizes = both(qmodel, batch, monkeypatch)
        assert sizes == {batch["input_ids"].numel()} and torch.equal(got, wanted)


def test_a_sample_of_padding_alone(monkeypatch):
    model, _ = build("BertModel")
    qmodel = qtk.quantize(model, 8, 8, calib=[padded()], preset="fast", progress=False)
    batch = padded(lengths=(4, 9))
    batch["attention_mask"][0] = 0
    got, wanted, sizes = both(qmodel, batch, monkeypatch)
    assert sizes == {9} and got.isfinite().all()
    assert_same_where_seen(got, wanted, batch)


def test_a_mask_that_is_written_to_is_read_again():
    x, mask = torch.zeros(2, 4, 8), torch.ones(2, 1, 4, 4, dtype=torch.bool)
    mask[0, :, :, 1:] = False
    assert packing.packing_of(x, mask).rows.tolist() == [0, 4, 5, 6, 7]
    mask[1, :, :, 2:] = False
    assert packing.packing_of(x, mask).rows.tolist() == [0, 4, 5]
    with torch.inference_mode():
        mask = mask.clone()
        assert packing.packing_of(x, mask).rows.tolist() == [0, 4, 5]


def test_a_bias_that_hides_nothing_is_no_padding():
    x, bias = torch.zeros(2, 4, 8), torch.full((2, 1, 4, 4), -100.0)
    assert packing.packing_of(x, bias).rows is None


def test_a_broken_sample_is_still_seen():
    model, batch = build("BertModel")
    qmodel = qtk.quantize(model, 8, 8, calib=[padded()], preset="fast", progress=False)
    batch = padded()
    x = qmodel.embeddings(batch["input_ids"])
    x[1, 2] = torch.nan
    with torch.no_grad():
        y = qmodel(inputs_embeds=x, attention_mask=batch["attention_mask"])[0]
    assert y[1, : LENGTHS[1]].isnan().all() and y[[0, 2, 3, 4]].isfinite().all()


def mask_of(*spans, T=6, causal=False, dtype=torch.bool):
    place = torch.arange(T)
    seen = torch.stack([(place >= first) & (place < end) for first, end in spans])
    mask = seen[:, None, None].expand(-1, 1, T, T)
    mask = mask & torch.ones(T, T, dtype=torch.bool).tril() if causal else mask.clone()
    if dtype == torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("causal", [False, True])
def test_sentences_are_found_in_a_mask(causal, dtype):
    """The second has no token that counts."""
    mask = mask_of((0, 3), (2, 2), (5, 6), causal=causal, dtype=dtype)
    found = packing.packing_of(torch.zeros(3, 6, 8), mask, sequences=True)
    assert found.rows.tolist() == [0, 1, 2, 17] and found.causal == causal
    assert found.sequences[0].tolist() == [0, 0, 3] and found.sequences[2].tolist() == [3, 5, 6]
    assert found.sequences[1, 1] == found.sequences[1, 2]  # no place between
    assert packing.packing_of(torch.zeros(3, 6, 8), mask).sequences is None


def odd_mask(kind):
    mask = mask_of((0, 3), (0, 2))
    if kind == "a hole":
        mask[..., 1] = False
    elif kind == "a window":
        mask[0, :, 0, 2] = False
    elif kind == "a bias":
        mask = mask_of((0, 3), (0, 2), dtype=torch.float32)
        mask[0, 0, 1, 2] = -1.5
    return mask


@pytest.mark.parametrize("kind", ["a hole", "a window", "a bias"])
def test_a_mask_that_says_more_is_read_in_whole(kind):
    found = packing.packing_of(torch.zeros(2, 6, 8), odd_mask(kind), sequences=True)
    assert found.sequences is None and found.rows is not None


@pytest.mark.parametrize("left", [True, False])
def test_a_decoder_attends_sentence_by_sentence(left, monkeypatch):
    """On the reference backend, whose attention reads them as a GPU's does."""
    model, _ = build("OPTForCausalLM")
    batch = padded(left)
    options = {"attention": "int8", "softmax": "code", "preset": "fast", "backend": "reference"}
    qmodel = qtk.quantize(model, 8, 8, calib=[batch], progress=False, **options)
    qmodel.config.use_cache = False
    called = []
    monkeypatch.setattr(
        "qtk.modules.fused.block.attend_sequences",
        lambda *args: called.append(args[4]) or attention.attend_sequences(*args),
    )
    got = qmodel(**batch)[0]
    assert called == [True] * len(called) and called
    monkeypatch.setattr(
        "qtk.modules.fused.block.packing_of", lambda x, *_: packing.Packing(*x.shape[:2])
    )
    assert_same_where_seen(got, qmodel(**batch)[0], batch)
