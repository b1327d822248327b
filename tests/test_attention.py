"""Quantized attention products and softmax inside models."""

import json

import pytest
import torch
from torch.nn.functional import cosine_similarity

import qtk
from qtk import assembly
from qtk.errors import CheckpointError, SchemeError
from qtk.modules.attention import QuantAttention
from qtk.scheme import AttentionScheme
from tests.zoo import build

FAMILIES = [
    "BertModel", "RobertaForSequenceClassification", "DistilBertModel", "OPTForCausalLM", "OPT350m",
    "ViTForImageClassification", "DeiTForImageClassification", "DistilledDeiT",
]  # fmt: skip
WAYS = [
    {"attention": "int8", "softmax": "matthew"},
    {"attention": "int4", "softmax": "code"},
    {"attention": "float", "softmax": "log2"},
    {"attention": "int8"},
    {"attention": "int8", "softmax": "code"},
]


def quantized(model, batch, **options):
    return qtk.quantize(model, calib=[batch], progress=False, **options)


def output(model, batch, **options):
    with torch.no_grad():
        return model(**batch, **options)[0]


def tokens(y, batch):
    mask = batch.get("attention_mask")
    return y[mask.bool()] if mask is not None and y.shape[:2] == mask.shape else y


@pytest.mark.parametrize("way", WAYS, ids=lambda w: "-".join(w.values()))
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_stays_close_and_fused(family, way):
    model, batch = build(family)
    qmodel = quantized(model, batch, **way)
    wanted, got = (tokens(output(m, batch), batch) for m in (model, qmodel))
    assert cosine_similarity(got, wanted, dim=-1).min() > 0.99
    assert all(block.is_fused for block in assembly.fused_blocks(qmodel).values())
    assert len(assembly.quantized_attentions(qmodel)) == 2


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_unfused_path_computes_the_same(family, implementation):
    model, batch = build(family)
    qmodel = quantized(model, batch, **WAYS[0])
    fused = tokens(output(qmodel, batch), batch)
    qmodel.set_attn_implementation(implementation)
    for block in assembly.fused_blocks(qmodel).values():
        next(block.children()).register_forward_hook(lambda *_: None)
    unfused = tokens(output(qmodel, batch), batch)
    assert cosine_similarity(unfused, fused, dim=-1).min() > 0.999


@pytest.mark.parametrize("way", WAYS, ids=lambda w: "-".join(w.values()))
@pytest.mark.parametrize("family", ["BertModel", "OPTForCausalLM", "ViTForImageClassification"])
def test_saved_and_loaded_bit_for_bit(family, way, tmp_path):
    model, batch = build(family)
    bits = {"*patch_embeddings.projection": (8, 8)} if "pixel_values" in batch else None
    qmodel = quantized(model, batch, **way, bits=bits)
    qmodel.save_pretrained(tmp_path)
    loaded = qtk.load(tmp_path)
    assert torch.equal(output(loaded, batch), output(qmodel, batch))
    assert qtk.summary(loaded).to_dict() == qtk.summary(qmodel).to_dict()
    record = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert record["attention"]["softmax"] == way.get("softmax", "float")


def test_softmax_alone_leaves_all_linears_in_floating_point(tmp_path):
    model, batch = build("BertModel")
    qmodel = qtk.quantize(model, 16, 16, softmax="code", progress=False)
    assert not assembly.quantized_layers(qmodel)
    wanted, got = (tokens(output(m, batch), batch) for m in (model, qmodel))
    assert not torch.equal(got, wanted) and cosine_similarity(got, wanted, dim=-1).min() > 0.999
    qmodel.save_pretrained(tmp_path)
    assert torch.equal(output(qtk.load(tmp_path), batch), output(qmodel, batch))


@pytest.mark.parametrize("way", WAYS, ids=lambda w: "-".join(w.values()))
def test_padding_changes_nothing(way):
    model, batch = build("BertModel")
    qmodel = quantized(model, batch, **way)
    short = {name: x[:1] for name, x in batch.items()}
    padded = {name: torch.cat([x, x.new_zeros(1, 5)], 1) for name, x in short.items()}
    got = output(qmodel, padded)[:, :8]
    assert cosine_similarity(got, output(qmodel, short), dim=-1).min() > 0.99999


@pytest.mark.parametrize("way", WAYS, ids=lambda w: "-".join(w.values()))
def test_later_tokens_change_nothing_earlier(way):
    model, batch = build("OPTForCausalLM")
    qmodel = quantized(model, batch, **way)
    ids = batch["input_ids"][:1]
    changed = torch.cat([ids[:, :5], ids[:, 5:].flip(1) + 1], 1) % 99
    a, b = (output(qmodel, {"input_ids": i}, use_cache=False)[:, :5] for i in (ids, changed))
    assert torch.allclose(a, b, atol=1e-5)


def test_a_cache_gives_what_the_whole_sequence_gives():
    model, batch = build("OPTForCausalLM")
    qmodel = quantized(model, batch, **WAYS[0])
    ids = batch["input_ids"][:1]
    with torch.no_grad():
        whole = qmodel(input_ids=ids, use_cache=False).logits[:, -1]
        first = qmodel(input_ids=ids[:, :-1], use_cache=True)
        step = qmodel(input_ids=ids[:, -1:], past_key_values=first.past_key_values).logits[:, -1]
    assert torch.allclose(step, whole, atol=1e-4)


def test_attention_maps_are_the_quantized_ones():
    model, batch = build("ViTForImageClassification")
    qmodel = quantized(model, batch, softmax="uniform", softmax_bits=4)
    with torch.no_grad():
        maps = qmodel(**batch, output_attentions=True).attentions
    assert len(maps) == 2 and all(len(a.unique()) < 200 for a in maps)


def test_gradients_are_those_of_float_attention():
    torch.manual_seed(0)
    attention = QuantAttention(2, 8, AttentionScheme(None, "code", 7))
    q, k, v = (torch.randn(1, 2, 6, 8, requires_grad=True) for _ in range(3))
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    weight = torch.randn(1, 6, 16)
    got = torch.autograd.grad((attention(q, k, v, mask=mask) * weight).sum(), (q, k, v))
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    want = torch.autograd.grad((y.transpose(1, 2).flatten(2) * weight).sum(), (q, k, v))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, want, strict=True))


def test_a_float_mask_hides_what_a_bool_mask_hides():
    attention = QuantAttention(2, 8, AttentionScheme(None, "uniform", 8))
    q, k, v = (torch.randn(1, 2, 6, 8) for _ in range(3))
    mask = torch.rand(1, 1, 6, 6) > 0.4
    added = torch.zeros(1, 1, 6, 6).masked_fill(~mask, torch.finfo(torch.float32).min)
    assert torch.equal(attention(q, k, v, mask=mask), attention(q, k, v, mask=added))


def test_summary_says_what_really_runs():
    model, batch = build("BertModel")
    qmodel = quantized(model, batch, **WAYS[0])
    summary = qtk.summary(qmodel)
    assert summary.attention == "int8 products, matthew 8-bit softmax"
    assert "quantized_attention" in summary.attention_kernel
    assert summary.attention in summary.table()
    assert qtk.summary(quantized(model, batch)).attention == "float"
    few = qtk.summary(quantized(model, batch, attention="int4"))
    assert few.attention.startswith("int4 (as int8) products")


def test_half_and_deepcopy_keep_the_scales():
    import copy

    model, batch = build("ViTForImageClassification")
    bits = {"*patch_embeddings.projection": (8, 8)}
    qmodel = copy.deepcopy(quantized(model, batch, **WAYS[0], bits=bits)).bfloat16()
    scales = [m.v_scale.dtype for m in assembly.quantized_attentions(qmodel).values()]
    assert scales == [torch.float32] * 2
    got = output(qmodel, {"pixel_values": batch["pixel_values"].bfloat16()})
    assert got.dtype == torch.bfloat16
    assert cosine_similarity(got.float(), output(model, batch), dim=-1).min() > 0.99


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda a: {**a, "softmax": "sqrt"}, "describes attention badly"),
        (lambda a: {**a, "bits": 3}, "describes attention badly"),
        (lambda a: {**a, "extra": 1}, "has a field 'extra'"),
        (lambda a: 3, "must be an object or null"),
        (lambda a: {**a, "softmax": "float", "softmax_bits": None}, "softmax_step"),
    ],
)
def test_a_checkpoint_that_lies_about_attention(change, told, tmp_path):
    model, batch = build("BertModel")
    quantized(model, batch, **WAYS[0]).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    record = config["quantization_config"]
    record["attention"] = change(record["attention"])
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=told):
        qtk.load(tmp_path, verify=False)  # else the checksum tells first


def test_a_checkpoint_whose_scale_is_zero(tmp_path):
    from safetensors.torch import load_file, save_file

    model, batch = build("BertModel")
    quantized(model, batch, **WAYS[0]).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith("v_scale"))
    tensors[name][0, 0] = 0
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="v_scale holds a zero"):
        qtk.load(tmp_path)


def test_integer_products_need_data():
    model, _ = build("BertModel")
    for options in ({"attention": "int8"}, {"softmax": "matthew"}):
        with pytest.raises(SchemeError, match="pass calib="):
            qtk.quantize(model, progress=False, **options)


@pytest.mark.parametrize("family", ["ViTForImageClassification", "BertModel", "OPTForCausalLM"])
def test_hessian_ranges_run_for_every_family(family):
    model, batch = build(family)
    qmodel = quantized(model, batch, ranges="hessian", **WAYS[0])
    wanted, got = (tokens(output(m, batch), batch) for m in (model, qmodel))
    assert cosine_similarity(got, wanted, dim=-1).min() > 0.99
