"""A quantized model copied, sent, loaded over and compiled afterwards is the same model."""

import copy
import io
import pickle

import pytest
import torch
import torch.multiprocessing as mp

import qtk
from qtk.modules.fused.block import FusedBlock
from tests.zoo import build

NAMES = ["BertModel", "OPTForCausalLM", "ViTForImageClassification"]


def quantized(name="BertModel", **options):
    model, batch = build(name, **options.pop("changes", {}))
    model.config.use_cache = False
    options = {"w": 8, "a": 8, "calib": [batch], "progress": False, **options}
    return qtk.quantize(model, **options), batch


def by_pickle(qmodel):
    return pickle.loads(pickle.dumps(qmodel))


def by_torch_save(qmodel):
    file = io.BytesIO()
    torch.save(qmodel, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def by_state_dict(qmodel):
    other, _ = quantized(type(qmodel).__name__)
    with torch.no_grad():
        for value in other.state_dict().values():
            value.zero_()
    other.load_state_dict(qmodel.state_dict())
    return other


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle, by_torch_save, by_state_dict])
@torch.no_grad()
def test_a_copy_compiles_at_its_first_call(name, copied):
    torch.compiler.reset()
    qmodel, batch = quantized(name)
    other = copied(qmodel)
    assert all(m.is_fused for m in other.modules() if isinstance(m, FusedBlock))
    y = torch.compile(other, fullgraph=True, backend="eager")(**batch)[0]
    assert torch.equal(y, qmodel(**batch)[0])


@torch.no_grad()
def _answer(qmodel, batch, queue):
    torch.set_num_threads(1)
    queue.put(qmodel(**batch)[0].numpy())


@pytest.mark.parametrize("scheme", [{}, {"w": 4, "a": 4}])
def test_a_model_can_be_sent_to_a_spawned_process(scheme):
    qmodel, batch = quantized(**scheme)
    context = mp.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_answer, args=(qmodel, batch, queue))
    process.start()
    got = torch.from_numpy(queue.get(timeout=300))
    process.join()
    with torch.no_grad():
        assert process.exitcode == 0 and torch.equal(got, qmodel(**batch)[0])


@pytest.mark.parametrize("name", NAMES)
def test_a_float_checkpoint_is_refused_in_one_line(name):
    qmodel, _ = quantized(name)
    model, _ = build(name)
    with pytest.raises(qtk.ModelError, match="is a float weight, and this model is quantized"):
        qmodel.load_state_dict(model.state_dict())


@pytest.mark.parametrize("options", [
    {}, {"a": 4, "w": 4}, {"attention": "int8", "softmax": "code"}, {"w": 4, "a": 16},
    {"activations": "token"}, {"backend": "reference"},
])  # fmt: skip
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_sample_with_nan_gets_no_answer_and_the_others_keep_theirs(name, options):
    qmodel, batch = quantized(name, **options)
    if name.startswith("ViT"):
        clean = batch["pixel_values"].clone()
        bad = clean.clone()
        bad[1, 0, 3, 3] = torch.nan
        key = "pixel_values"
    else:
        clean = qmodel.get_input_embeddings()(batch["input_ids"])
        bad = clean.clone()
        bad[1, 0, 3] = torch.nan
        key = "inputs_embeds"
    y, wanted = qmodel(**{key: bad})[0], qmodel(**{key: clean})[0]
    assert torch.equal(y[0], wanted[0])
    assert y[1].isnan().all()


@torch.no_grad()
def test_a_linear_by_itself_passes_nan_on():
    qmodel, _ = quantized()
    layer = qmodel.encoder.layer[0].output.dense
    x = torch.randn(3, layer.in_features)
    x[1, 5] = torch.inf
    y = layer(x)
    assert y[1].isnan().all() and torch.isfinite(y[[0, 2]]).all()


@pytest.mark.parametrize("scheme", [{}, {"w": 4, "a": 4}, {"w": 4, "a": 16}, {"w": 3, "a": 8}])
def test_layers_become_float_again(scheme):
    """The float layer computes what the quantized one does but for the rounding of its input."""
    qmodel, _ = quantized(**scheme)
    layer = qmodel.encoder.layer[0].output.dense
    linear = layer.dequantized()
    x = torch.randn(5, layer.in_features)
    spec = layer.spec()
    exact = spec.grid.change.inputs(x) @ spec.weight().T + spec.bias
    assert torch.allclose(linear(x), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("options", [
    {}, {"attention": "int8", "softmax": "code"},
    {"bits": {"embeddings.word_embeddings": (8, 16)}}, {"w": 4, "a": 16, "method": "none"},
])  # fmt: skip
@torch.no_grad()
def test_a_model_becomes_float_again(options, tmp_path):
    qmodel, batch = quantized(**options)
    model, _ = build("BertModel")
    y = qmodel(**batch)[0]
    float_again = qmodel.dequantize()
    assert not any(type(m).__module__.startswith("qtk.") for m in float_again.modules())
    got = float_again(**batch)[0]
    assert torch.nn.functional.cosine_similarity(got, y, dim=-1).min() > 0.999
    float_again.save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path)(**batch)[0], got)
    assert all(p.requires_grad for p in float_again.parameters())


def test_a_quantized_table_is_not_resized():
    qmodel, _ = quantized(bits={"embeddings.word_embeddings": (8, 16)})
    with pytest.raises(qtk.ModelError, match="resize the float model's"):
        qmodel.resize_token_embeddings(120)
