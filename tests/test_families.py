import pytest
import torch
from torch.nn.functional import cosine_similarity

import qtk
from qtk.assembly import fused_blocks, quantized_layers
from qtk.discover import available, load
from qtk.models import describe, fold_scales
from qtk.modules.fused.kernels import norm_quantize
from qtk.modules.fused.parts import make_parts
from tests.zoo import build

CONVOLUTIONAL = ("mobilenet_v1", "mobilenet_v2", "resnet")  # tests/test_networks.py
FAMILIES = [name for name in available("models") if name not in CONVOLUTIONAL]
IMAGES = ("beit", "clip_vision_model", "deit", "dinov2", "ijepa", "siglip_vision_model", "vit")
TEXT = [name for name in FAMILIES if name not in IMAGES]
UNFUSED = ("deberta_v2", "mpnet")  # their attention adds what no fused block computes
FUSED = [name for name in FAMILIES if name not in UNFUSED]
SCHEMES = {
    "W8A8": {},
    "W8A8 token": {"activations": "token"},
    "W4A8": {"w": 4},
    "W4A4": {"w": 4, "a": 4},
    "W4A16 g16": {"w": 4, "a": 16, "group_size": 16},
    "W4A16 g16 asymmetric": {"w": 4, "a": 16, "group_size": 16, "weights": "asymmetric"},
}
WORST = {
    "W8A8": 0.999, "W8A8 token": 0.999, "W4A8": 0.96, "W4A4": 0.9, "W4A16 g16": 0.96,
    "W4A16 g16 asymmetric": 0.96,
}  # fmt: skip


def tiny(family):
    torch.manual_seed(0)
    model, batch = load("models", family).tiny()
    model.config.use_cache = False  # with a cache to fill, OPT's own blocks run
    return model, batch


def quantized(model, batch, **options):
    return qtk.quantize(model, **{"calib": [batch], "progress": False, **options})


@torch.no_grad()
def output(model, batch, **options):
    return model(**batch, **options)[0]


def tokens(y, batch):
    """[tokens, features], without the padding."""
    mask = batch.get("attention_mask")
    return y[mask.bool()] if mask is not None and y.dim() == 3 else y.reshape(-1, y.shape[-1])


def unfused(model):
    """The same model, made to run its original blocks by a hook that does nothing."""
    for block in describe(model):
        module = model.get_submodule(block.name)
        module.get_submodule(block.anatomy.mlp.down).register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_close_to_floating_point(family, scheme):
    model, batch = tiny(family)
    qmodel = quantized(model, batch, **SCHEMES[scheme])
    assert {layer.scheme.name for layer in quantized_layers(qmodel).values()} == {scheme}
    y, y_hat = (tokens(output(m, batch), batch) for m in (model, qmodel))
    assert y_hat.shape == y.shape and y_hat.dtype == y.dtype
    assert cosine_similarity(y, y_hat, dim=-1).min() > WORST[scheme]


@pytest.mark.parametrize("scheme", ["W8A8", "W8A8 token", "W4A4"])
@pytest.mark.parametrize("family", FUSED)
def test_fused_and_unfused_blocks_agree(family, scheme):
    model, batch = tiny(family)
    qmodel = quantized(model, batch, **SCHEMES[scheme])
    assert all(block.is_fused for block in fused_blocks(qmodel).values())
    torch.manual_seed(1)
    batch = load("models", family).tiny()[1]  # not what it was calibrated on
    fused = tokens(output(qmodel, batch), batch)
    plain = tokens(output(unfused(qmodel), batch), batch)
    # Folding a norm into a quantizer moves float32 sums by an ulp, so a value next to the middle
    # of two codes may fall to the other one, and move what follows: two roundings of one model,
    # whose errors add up where they are independent.
    error = (tokens(output(model, batch), batch) - plain).square().mean()
    assert (fused - plain).square().mean() <= 2 * error


@pytest.mark.parametrize("family", FUSED)
def test_fused_and_unfused_blocks_give_the_same_codes_but_at_ties(family):
    model, batch = tiny(family)
    qmodel = quantized(model, batch)
    block = describe(qmodel)[0]
    seen = []

    def keep(module, args):
        seen.append(args[0])

    qmodel.get_submodule(block.name).register_forward_pre_hook(keep)
    output(qmodel, batch)
    (x,) = seen
    module = qmodel.get_submodule(block.name)
    anatomy, parts = block.anatomy, make_parts(module, block.anatomy)
    norm = module.get_submodule(anatomy.norm1)
    if anatomy.pre_norm:
        reader = module.get_submodule(anatomy.attention.q)
        (fused, _), _ = norm_quantize(parts.norm1, parts.read_x, x)
    else:
        reader = module.get_submodule(anatomy.mlp.up[0])
        (fused, _), _ = norm_quantize(parts.norm1, parts.read_norm, x, x, "norm")
        x = x + x
    plain, _ = reader.quantize(norm(x))
    difference = (fused.int() - plain.int()).abs()
    assert difference.max() <= 1
    # A channel that Outlier Suppression+ has scaled ends in the middle of two codes, so that ties
    # are not rare; a sum over K channels errs by K roundings of its largest term.
    folded, K = parts.norm1, x.shape[-1]
    weight, bias = folded.q_weight.double(), folded.q_bias.double()
    exact = torch.nn.functional.layer_norm(x.double(), (K,), weight, bias, folded.eps)
    to_a_tie = (exact - exact.floor() - 0.5).abs()
    assert (to_a_tie <= K * 2.0**-24 * (exact.abs() + bias.abs() + 1))[difference > 0].all()


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_those_of_every_block(family):
    model, batch = tiny(family)
    qmodel = quantized(model, batch)
    with torch.no_grad():
        wanted = model(**batch, output_hidden_states=True).hidden_states
        got = qmodel(**batch, output_hidden_states=True).hidden_states
    assert len(got) == len(wanted) == 3
    for y, y_hat in zip(wanted, got, strict=True):
        y, y_hat = tokens(y, batch), tokens(y_hat, batch)
        assert (y - y_hat).norm() < 0.05 * y.norm()
    assert torch.equal(output(qmodel, batch, output_hidden_states=True), output(qmodel, batch))


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_maps_can_be_asked_for(family):
    model, batch = tiny(family)
    qmodel = quantized(model, batch)
    qmodel.set_attn_implementation("eager")
    with torch.no_grad():
        out = qmodel(**batch, output_attentions=True)
    assert len(out.attentions) == 2
    rows = torch.stack([a.sum(-1) for a in out.attentions])
    assert torch.allclose(rows, torch.ones_like(rows), atol=1e-5)
    y = tokens(output(qmodel, batch), batch)
    assert cosine_similarity(tokens(out[0], batch), y, dim=-1).min() > 0.999


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_either_attention_gives_the_same(family, attention):
    model, batch = tiny(family)
    qmodel = quantized(model, batch)
    y = tokens(output(qmodel, batch), batch)
    qmodel.set_attn_implementation(attention)
    other = tokens(output(qmodel, batch), batch)
    assert cosine_similarity(other, y, dim=-1).min() > 0.999


@pytest.mark.parametrize("activations", ["static", "token"])
@pytest.mark.parametrize("family", TEXT)
def test_padding_changes_nothing(family, activations):
    model, _ = tiny(family)
    ids = torch.randint(3, 99, (3, 8))
    mask = torch.ones_like(ids)
    mask[1, 5:] = mask[2, 2:] = 0
    qmodel = quantized(model, {"input_ids": ids, "attention_mask": mask}, activations=activations)
    together = output(qmodel, {"input_ids": ids, "attention_mask": mask})
    for row, length in enumerate((8, 5, 2)):
        alone = output(qmodel, {"input_ids": ids[row : row + 1, :length]})
        # the same products in another order: a code may move by one where it sits on a tie
        assert cosine_similarity(together[row, :length], alone[0], dim=-1).min() > 0.9995


def test_left_padding_of_opt_changes_nothing():
    model, _ = tiny("opt")
    ids = torch.randint(3, 99, (2, 8))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    qmodel = quantized(model, {"input_ids": ids, "attention_mask": mask})
    together = output(qmodel, {"input_ids": ids, "attention_mask": mask})
    alone = output(qmodel, {"input_ids": ids[1:, 3:]})
    assert cosine_similarity(together[1, 3:], alone[0], dim=-1).min() > 0.9995


@pytest.mark.parametrize("name", ["OPTForCausalLM", "OPT350m"])
def test_generating_with_a_cache_is_generating_without(name):
    model, batch = build(name)
    qmodel = quantized(model, batch)
    prompt = batch["input_ids"][:1]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    cached = qmodel.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    ids = prompt
    for _ in range(6):
        logits = output(qmodel, {"input_ids": ids}, use_cache=False)[:, -1]
        logits[:, qmodel.config.eos_token_id] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(cached, ids)


@pytest.mark.parametrize("name", ["OPTForCausalLM", "OPT350m"])
def test_a_padded_batch_generates_what_its_rows_do(name):
    model, batch = build(name)
    qmodel = quantized(model, batch)
    ids = torch.randint(3, 99, (2, 6))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    both = qmodel.generate(ids, attention_mask=mask, **options)[:, 6:]
    short = qmodel.generate(ids[:1, 2:], attention_mask=mask[:1, 2:], **options)[:, 4:]
    assert torch.equal(both[:1], short)


@pytest.mark.parametrize("family", FUSED)
def test_no_rows_in_no_rows_out(family):
    """transformers' own attention cannot; the fused blocks can."""
    model, batch = tiny(family)
    empty = {k: v[:0] for k, v in batch.items()}
    shape = output(model, batch).shape
    for scheme in ("W8A8", "W8A8 token", "W4A4"):
        qmodel = quantized(model, batch, **SCHEMES[scheme])
        assert output(qmodel, empty).shape == (0, *shape[1:])


@pytest.mark.parametrize("name, changes", [
    ("BertModel", {"hidden_act": "mish"}),
    ("ViTForImageClassification", {"hidden_act": "leaky_relu"}),
    ("OPTForCausalLM", {"activation_function": "tanh"}),
])  # fmt: skip
def test_an_activation_without_a_kernel_runs_unfused(name, changes):
    model, batch = build(name, **changes)
    qmodel = quantized(model, batch)
    assert not any(block.is_fused for block in fused_blocks(qmodel).values())
    assert not any(layer.fused for layer in qtk.summary(qmodel).layers)
    y, y_hat = (tokens(output(m, batch), batch) for m in (model, qmodel))
    assert cosine_similarity(y, y_hat, dim=-1).min() > 0.999


@pytest.mark.parametrize("name, changes", [
    ("BertModel", {"hidden_act": "gelu_new"}), ("BertModel", {"hidden_act": "relu"}),
    ("BertModel", {"hidden_act": "silu"}), ("ViTModel", {"hidden_act": "quick_gelu"}),
    ("ViTModel", {"hidden_act": "gelu_pytorch_tanh"}), ("ViTModel", {"qkv_bias": False}),
    ("OPTModel", {"activation_function": "gelu"}), ("OPTModel", {"enable_bias": False}),
    ("OPTModel", {"layer_norm_elementwise_affine": False}),
    ("OPT350m", {}), ("BertModel", {"is_decoder": True}),
])  # fmt: skip
def test_variants_of_a_family_are_fused_too(name, changes):
    model, batch = build(name, **changes)
    model.config.use_cache = False
    qmodel = quantized(model, batch)
    assert all(block.is_fused for block in fused_blocks(qmodel).values())
    y, y_hat = (tokens(output(m, batch), batch) for m in (model, qmodel))
    assert cosine_similarity(y, y_hat, dim=-1).min() > 0.999
    plain = tokens(output(unfused(qmodel), batch), batch)
    assert cosine_similarity(y_hat, plain, dim=-1).min() > 0.9999


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_names_each_linear_once(family):
    model, _ = tiny(family)
    names = [n for block in describe(model) for group in block.groups for n in group.linears]
    assert len(names) == len(set(names)) == 12
    assert all(isinstance(model.get_submodule(n), torch.nn.Linear) for n in names)


@torch.no_grad()
def test_a_cached_step_is_the_last_row_of_the_whole_and_stays_fused(monkeypatch):
    from qtk.modules.fused.block import FusedBlock

    model, batch = load("models", "opt").tiny()
    qmodel = qtk.quantize(model, 8, 8, calib=[batch], progress=False)
    fused, original = [], FusedBlock.fused
    monkeypatch.setattr(FusedBlock, "fused", lambda *a: fused.append(1) or original(*a))
    ids = batch["input_ids"]
    whole = qmodel(input_ids=ids, use_cache=False).logits
    first = qmodel(input_ids=ids[:, :5], use_cache=True)
    rest = qmodel(input_ids=ids[:, 5:], past_key_values=first.past_key_values, use_cache=True)
    assert len(fused) == 3 * 2  # three calls of two blocks
    assert torch.allclose(rest.logits, whole[:, 5:], atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_back_from_disk_as_it_was(family, tmp_path):
    model, batch = tiny(family)
    qmodel = quantized(model, batch)
    qmodel.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(output(again.eval(), batch), output(qmodel, batch))


@pytest.mark.parametrize("family", ["beit", "dinov2"])
def test_layer_scale_is_folded_exactly(family):
    """One rounding of the product of a scale and a weight is all that may differ."""
    model, batch = tiny(family)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lambda" in name:
            parameter.data.uniform_(0.5, 2)
    wanted = output(model.double(), {k: x.double() for k, x in batch.items()})
    fold_scales(model, describe(model))
    got = output(model, {k: x.double() for k, x in batch.items()})
    assert torch.allclose(got, wanted, rtol=1e-12, atol=1e-12)
    assert all((p == 1).all() for name, p in model.named_parameters() if "lambda" in name)


@pytest.mark.parametrize(("family", "changes", "fused"), [
    ("dinov2", {"use_swiglu_ffn": True}, True),
    ("beit", {"use_relative_position_bias": True}, False),
    ("beit", {"layer_scale_init_value": 0.0}, True),
    ("electra", {"embedding_size": 32}, True),
    ("clip_text_model", {"hidden_act": "gelu"}, True),
])  # fmt: skip
def test_variants_of_the_other_families(family, changes, fused):
    torch.manual_seed(0)
    model, batch = load("models", family).tiny(**changes)
    qmodel = quantized(model, batch)
    blocks = fused_blocks(qmodel).values()
    assert (bool(blocks) and all(block.is_fused for block in blocks)) == fused
    y, y_hat = (tokens(output(m, batch), batch) for m in (model, qmodel))
    assert cosine_similarity(y, y_hat, dim=-1).min() > 0.999


def test_a_deberta_with_a_convolution_between_blocks_is_refused():
    model, batch = load("models", "deberta_v2").tiny(conv_kernel_size=3, conv_act="tanh")
    with pytest.raises(qtk.ModelError, match="convolution"):
        quantized(model, batch)
