"""torch.compile takes a quantized model whole: one graph, the same numbers."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

import qtk
from qtk.discover import load

FAMILIES = ("bert", "opt", "vit")
SCHEMES = {
    "W8A8": {},
    "W8A8 token": {"activations": "token"},
    "W4A4": {"w": 4, "a": 4},
    "W4A4 plain": {"w": 4, "a": 4, "method": "none"},
    "W4A8 g16": {"w": 4, "group_size": 16},
    "W4A16 g16": {"w": 4, "a": 16, "group_size": 16},
}


def quantized(family, **options):
    torch.manual_seed(0)
    model, batch = load("models", family).tiny()
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


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_graph_with_the_same_numbers(family, scheme):
    qmodel, batch = quantized(family, **SCHEMES[scheme])
    y = output(qmodel, batch)
    compiled = torch.compile(qmodel, fullgraph=True, backend="eager")
    assert torch.equal(output(compiled, batch), y)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_default_compiler(family):
    qmodel, batch = quantized(family)
    y = output(qmodel, batch)
    y_hat = output(torch.compile(qmodel, fullgraph=True), batch)
    # the compiler fuses float32 operations its own way: a code may move by one at a tie
    assert cosine_similarity(y_hat.flatten(), y.flatten(), dim=0) > 0.9999


def test_a_loaded_model_compiles(tmp_path):
    qmodel, batch = quantized("bert")
    qmodel.save_pretrained(tmp_path)
    loaded = qtk.load(tmp_path)
    compiled = torch.compile(loaded, fullgraph=True, backend="eager")
    assert torch.equal(output(compiled, batch), output(qmodel, batch))
