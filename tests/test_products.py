"""Every product, found by being there, computes what the value it was made of says."""

import pytest
import torch

import qtk
from qtk.discover import available
from qtk.errors import BackendError, SchemeError
from qtk.grids import InputGrid, LinearSpec, Steps
from qtk.modules.linear import QuantLinear
from qtk.modules.products import Operands, product_of
from qtk.modules.products.onednn import OneDnn
from qtk.numerics import scale_and_zero_point
from qtk.scheme import Scheme
from tests.zoo import build

PRODUCTS = {  # the arguments of a scheme, a backend, and the product that serves
    "onednn": [((8, 8), "cpu"), ((4, 8, "token"), "cpu")],
    "int8": [((8, 8), "triton"), ((8, 8, "token", 64), "cpu"), ((6, 6), "reference")],
    "int4": [((4, 8), "triton"), ((4, 4), "triton"), ((3, 8, "token", 32), "reference")],
    "weight_only": [((8, 16), "triton"), ((4, 16), "reference"), ((8, 16), "cpu")],
    "few_rows": [((4, 16, "static", 32, "asymmetric"), "cpu")],
    "fp8": [(("fp8", "fp8"), backend) for backend in ("triton", "cpu", "reference")],
}
CASES = [(name, *case) for name, cases in PRODUCTS.items() for case in cases]
ACTIVATION = torch.nn.functional.gelu


def a_spec(scheme: Scheme, N: int = 48, K: int = 256) -> LinearSpec:
    if scheme.name == "FP8":
        codes = torch.randn(N, K).mul(100).to(torch.float8_e4m3fn).view(torch.int8)
    else:
        codes = torch.randint(scheme.w.qmin, scheme.w.qmax + 1, (N, K), dtype=torch.int8)
    G = 1 if scheme.w.group_size is None else -(-K // scheme.w.group_size)
    zero_point = None if scheme.w.symmetric else torch.randint(-3, 4, (N, G)).float()
    steps = Steps(scheme.w, torch.rand(N, G) + 0.1, zero_point)
    grid = InputGrid(scheme.a)
    if scheme.a is not None and scheme.a.granularity == "tensor":
        ends = scale_and_zero_point(torch.tensor(-3.0), torch.tensor(4.0), scheme.a)
        grid = InputGrid(scheme.a, scale=ends[0], zero_point=ends[1])
    return LinearSpec(codes, steps, grid, torch.randn(N))


def test_every_product_has_cases():
    assert set(available("modules.products")) == set(PRODUCTS)


@pytest.mark.parametrize(("name", "options", "backend"), CASES)
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_a_product_computes_what_its_layer_is(name, options, backend, rows, monkeypatch):
    monkeypatch.setenv("QTK_CPU_INT8", "1" if name == "onednn" else "0")
    spec = a_spec(Scheme.of(*options))
    if name == "onednn":  # a CPU without these instructions saturates sums of two products
        small = spec.codes.clamp(-60, 60)
        spec = LinearSpec(small, spec.steps, spec.grid, spec.bias)
    layer = QuantLinear.from_spec(spec, backend)
    assert type(layer.product).__module__.endswith(f".{name}")
    x = torch.randn(rows, 256)
    size = spec.grid.fake_quantize(x).abs() @ spec.weight().abs().T + spec.bias.abs()
    # float32 sums in another order; few tokens of four-bit weights are computed in bfloat16
    limit = 2**-7 if name == "few_rows" else 256 * 2**-24
    assert ((layer(x) - spec.reference(x)).abs() <= limit * size + 1e-5).all()
    assert torch.equal(layer.product.codes(), spec.codes)
    activated = layer.product.activated("gelu")(*layer.reader(x))
    assert torch.allclose(activated, ACTIVATION(layer(x)), rtol=1e-5, atol=1e-4 * float(size.max()))


def test_four_bit_inputs_are_packed_for_tritons_product_and_the_summary_says_so():
    model, batch = build("BertModel", hidden_size=128, intermediate_size=256)
    options = {"calib": [batch], "progress": False, "method": "none", "rounding": "nearest"}
    qmodel = qtk.quantize(model, 4, 4, backend="triton", **options)
    assert {layer.kernel for layer in qtk.summary(qmodel).layers} == {
        "triton int4_linear, packed inputs"
    }
    layer = qmodel.encoder.layer[0].output.dense
    codes, _ = layer.quantize(torch.randn(3, 256))
    assert codes.dtype == torch.uint8 and codes.shape == (3, 128)
    with torch.no_grad():
        y = qmodel(**batch)[0]
        wanted = qtk.quantize(model, 4, 4, backend="reference", **options)(**batch)[0]
    assert torch.nn.functional.cosine_similarity(y, wanted, dim=-1).min() > 0.9999


@pytest.mark.parametrize("backend", ["triton", "reference", "cpu"])
@pytest.mark.parametrize("bits", [8, 6])
def test_codes_go_from_product_to_product_where_the_grid_allows(backend, bits):
    """A value beside the middle of two codes may fall to the other, but rarely."""
    model, batch = build("BertModel")
    qmodel = qtk.quantize(
        model, 8, bits, calib=[batch], backend=backend, progress=False, method="none"
    )
    block = qmodel.encoder.layer[0]
    parts = block._parts
    emitting = parts.emitting()
    if bits != 8 and isinstance(parts.up, OneDnn):
        assert emitting is None  # its epilogue saturates to eight bits, no fewer
        return
    assert emitting is not None
    codes = parts.read_norm(torch.randn(50, 32))
    got = emitting(*codes)
    wanted, scale = parts.read_hidden(parts.up(*codes), "gelu")
    assert scale is None and got.dtype == wanted.dtype
    differ = (got.int() - wanted.int()).abs()
    assert differ.max() <= 1 and (differ > 0).float().mean() < 0.01


def test_a_grid_with_a_change_of_variable_is_read_by_its_quantizer():
    model, batch = build("BertModel")
    qmodel = qtk.quantize(model, 4, 4, calib=[batch], progress=False)  # rotates
    assert qmodel.encoder.layer[0]._parts.emitting() is None


@pytest.mark.parametrize("name", ["BertModel", "OPTForCausalLM", "ViTForImageClassification"])
def test_fp8_runs_from_end_to_end_and_comes_back_from_disk(name, tmp_path):
    model, batch = build(name)
    model.config.use_cache = False
    qmodel = qtk.quantize(model, "fp8", "fp8", calib=[batch], progress=False)
    layers = qtk.summary(qmodel).layers
    assert {layer.scheme for layer in layers} == {"FP8"}
    assert all("fake quantization to e4m3" in layer.kernel and layer.fused for layer in layers)
    with torch.no_grad():
        y, wanted = qmodel(**batch)[0], model(**batch)[0]
    error = (y - wanted).flatten(0, -2)
    # e4m3 has a relative step of 1/8: an error of some 3 % at each of a dozen sites
    assert error.norm() < 0.15 * wanted.norm() and error.norm() > 0
    qmodel.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(qtk.load(tmp_path)(**batch)[0], y)


@pytest.mark.parametrize(("options", "match"), [
    ({"w": "fp8", "a": 8}, "FP8 weights go with FP8 activations"),
    ({"w": 8, "a": "fp8"}, "FP8 weights go with FP8 activations"),
    ({"w": "fp8", "a": "fp8", "group_size": 32}, "without groups"),
    ({"w": "fp8", "a": "fp8", "weights": "asymmetric"}, "zero points"),
    ({"w": "fp8", "a": "fp8", "method": "rotate"}, "method='rotate' is for integer grids"),
    ({"w": "fp8", "a": "fp8", "rounding": "gptq"}, "rounding='gptq' is for integer grids"),
    ({"w": "fp8", "a": "fp8", "ranges": "mse"}, "ranges='mse' is for integer grids"),
    ({"w": "fp8", "a": "fp8", "bits": "auto"}, "chooses among integers"),
    ({"w": "fp9", "a": "fp9"}, "or 'fp8'"),
])  # fmt: skip
def test_what_fp8_does_not_go_with_is_refused(options, match):
    model, batch = build("BertModel")
    with pytest.raises(SchemeError, match=match):
        qtk.quantize(model, calib=[batch], progress=False, **options)


def test_operands_that_nothing_multiplies_are_refused(monkeypatch):
    monkeypatch.setattr("qtk.modules.products.weight_only.fits", lambda *_: False)
    monkeypatch.setattr("qtk.modules.products.few_rows.fits", lambda *_: False)
    spec = a_spec(Scheme.of(8, 8))
    strange = Operands(spec.codes, spec.steps.scale, None, spec.steps.fmt, a=None)
    with pytest.raises(BackendError, match="no product on backend 'abacus'"):
        product_of(strange, "abacus")
