"""torch.compile takes a quantized model whole: one graph, the same numbers."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

import qtk
from qtk.modules.fused.block import FusedBlock
from tests.zoo import build

NAMES = ("BertModel", "OPTForCausalLM", "ViTForImageClassification")
SCHEMES = {
    "W8A8": {},
    "W8A8 token": {"activations": "token"},
    "W4A4": {"w": 4, "a": 4},
    "W4A4 plain": {"w": 4, "a": 4, "method": "none"},
    "W4A8 g16": {"w": 4, "group_size": 16},
    "W4A16 g16": {"w": 4, "a": 16, "group_size": 16},
    "W4A16 asymmetric": {"w": 4, "a": 16, "weights": "asymmetric"},
}


def quantized(name, **options):
    model, batch = build(name, num_hidden_layers=1)
    model.config.use_cache = False
    return qtk.quantize(model, calib=[batch], progress=False, **options), batch


@torch.no_grad()
def output(model, batch):
    return model(**batch)[0]


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("name, scheme", [
    *((name, "W8A8") for name in NAMES), *(("BertModel", scheme) for scheme in list(SCHEMES)[1:]),
])  # fmt: skip
def test_one_graph_with_the_same_numbers(name, scheme):
    qmodel, batch = quantized(name, **SCHEMES[scheme])
    y = output(qmodel, batch)
    compiled = torch.compile(qmodel, fullgraph=True, backend="eager")
    assert torch.equal(output(compiled, batch), y)


@pytest.mark.parametrize("name", NAMES)
def test_the_default_compiler(name):
    qmodel, batch = quantized(name)
    y = output(qmodel, batch)
    y_hat = output(torch.compile(qmodel, fullgraph=True), batch)
    # the compiler fuses float32 operations its own way: a code may move by one at a tie
    assert cosine_similarity(y_hat.flatten(), y.flatten(), dim=0) > 0.9999


@pytest.mark.parametrize(("name", "options"), [
    ("BertModel", {}), ("OPTForCausalLM", {}), ("BertModel", SCHEMES["W4A16 g16"]),
    ("BertModel", SCHEMES["W4A16 asymmetric"]),
    pytest.param("ViTForImageClassification", {}, marks=pytest.mark.slow),
    pytest.param("BertModel", SCHEMES["W4A4"], marks=pytest.mark.slow),
    pytest.param("BertModel", {"attention": "int8", "softmax": "code"}, marks=pytest.mark.slow),
])  # fmt: skip
def test_one_graph_of_kernels(name, options):
    """What a GPU compiles: the launchers are nodes. Here their kernels run in the interpreter."""
    qmodel, batch = quantized(name, **options, backend="triton")
    y = output(qmodel, batch)
    nodes = []

    def note(graph, _):
        nodes.extend(str(n.target) for n in graph.graph.nodes if str(n.target).startswith("qtk."))
        return graph

    assert torch.equal(output(torch.compile(qmodel, fullgraph=True, backend=note), batch), y)
    assert len(nodes) >= 6


def test_gradients_pass_a_compiled_layer_of_kernels():
    """Straight through the rounding: the gradient is that of the dequantized weight."""
    qmodel, _ = quantized("BertModel", backend="triton")
    layer = qmodel.encoder.layer[0].output.dense
    x = torch.randn(4, layer.in_features, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    (eager,) = torch.autograd.grad(layer(x).square().sum(), x)
    (got,) = torch.autograd.grad(compiled(x).square().sum(), x)
    assert torch.equal(compiled(x), layer(x))
    torch.testing.assert_close(got, eager)
    assert got.abs().max() > 0


def test_another_batch_and_length_need_no_other_model():
    qmodel, batch = quantized("BertModel")
    compiled = torch.compile(qmodel, fullgraph=True, backend="eager", dynamic=True)
    for rows, length in ((2, 8), (3, 5), (1, 7)):
        batch = {"input_ids": torch.randint(3, 99, (rows, length))}
        assert torch.equal(output(compiled, batch), output(qmodel, batch))


@pytest.mark.parametrize("name", NAMES)
def test_a_moved_model_compiles_at_its_first_call(name):
    qmodel, batch = quantized(name)
    qmodel = qmodel.to(torch.bfloat16)
    batch = {k: x.to(torch.bfloat16) if x.is_floating_point() else x for k, x in batch.items()}
    compiled = torch.compile(qmodel, fullgraph=True, backend="eager")
    y = output(compiled, batch)
    assert y.dtype == torch.bfloat16 and torch.equal(y, output(qmodel, batch))


def test_a_loaded_model_compiles(tmp_path):
    qmodel, batch = quantized("BertModel")
    qmodel.save_pretrained(tmp_path)
    loaded = qtk.load(tmp_path)
    compiled = torch.compile(loaded, fullgraph=True, backend="eager")
    assert torch.equal(output(compiled, batch), output(qmodel, batch))


def test_the_default_compiler_takes_other_sizes():
    """One graph for all of them, where the CPU computes in oneDNN's integers: W7A8 does on AVX2."""
    qmodel, _ = quantized("BertModel", w=7)
    compiled = torch.compile(qmodel, fullgraph=True, dynamic=True)
    for rows, length in ((2, 8), (3, 5)):
        batch = {"input_ids": torch.randint(3, 99, (rows, length))}
        y_hat, y = output(compiled, batch), output(qmodel, batch)
        assert cosine_similarity(y_hat.flatten(), y.flatten(), dim=0) > 0.9999


@pytest.mark.parametrize("name", ["BertModel", "OPTForCausalLM"])
def test_compiled_after_gradients(name):
    qmodel, batch = quantized(name)
    rest = {name: x for name, x in batch.items() if name != "input_ids"}
    vectors = qmodel.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    for _ in range(2):
        qmodel(inputs_embeds=vectors, **rest)[0].sum().backward()
        qmodel(**batch)
    assert vectors.grad.abs().max() > 0
    compiled = torch.compile(qmodel, fullgraph=True, backend="eager")
    assert torch.equal(output(compiled, batch), output(qmodel, batch))
    assert torch.equal(compiled(**batch)[0], output(qmodel, batch))


@pytest.mark.parametrize(("name", "options"), [
    *((name, {"w": 7}) for name in NAMES), ("BertModel", {"w": 7, "activations": "token"}),
    ("BertModel", {}), ("BertModel", SCHEMES["W4A4"]), ("BertModel", SCHEMES["W4A16 g16"]),
])  # fmt: skip
def test_an_exported_program_is_saved_and_loaded(name, options, tmp_path):
    qmodel, batch = quantized(name, **options)
    fused = [m.is_fused for m in qmodel.modules() if isinstance(m, FusedBlock)]
    dynamic = {k: {0: torch.export.Dim.DYNAMIC, **({1: torch.export.Dim.DYNAMIC} if x.dim() < 3
               else {})} for k, x in batch.items()}  # fmt: skip
    with torch.no_grad():
        program = torch.export.export(qmodel, (), dict(batch), dynamic_shapes=dynamic)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    assert torch.equal(output(loaded, batch), output(qmodel, batch))
    other = {k: torch.cat([x, x]) for k, x in batch.items()}
    assert torch.equal(output(loaded, other), output(qmodel, other))
    assert [m.is_fused for m in qmodel.modules() if isinstance(m, FusedBlock)] == fused


def test_a_saved_cpu_model_becomes_onnx_by_pytorch(tmp_path):
    """PyTorch's own exporter has no word for oneDNN: the reference backend is plain PyTorch."""
    pytest.importorskip("onnxscript")
    session = pytest.importorskip("onnxruntime").InferenceSession
    qmodel, batch = quantized("BertModel")
    qmodel.save_pretrained(tmp_path / "model")
    loaded = qtk.load(tmp_path / "model", backend="reference")
    y, path = output(qmodel, batch), tmp_path / "model.onnx"
    torch.onnx.export(loaded, (), path, kwargs=dict(batch), dynamo=True, verbose=False)
    feed = {k: x.numpy() for k, x in batch.items()}
    y_hat = torch.from_numpy(session(path).run(None, feed)[0])
    assert cosine_similarity(y_hat.flatten(), y.flatten(), dim=0) > 0.999
