import pytest
import torch

from qtk_kernels import _launch
from qtk_kernels.codes import Codes
from qtk_kernels.layer_norm_quantize import layer_norm_quantize

ULP = 2.0**-24
EPS = 1e-5
OUTPUTS = [Codes(8), Codes(4, "token", offset=8, clip=0.9), Codes(8, 32), Codes(8, 10)]


def inputs(*shape, dtype=torch.float32):
    K = shape[-1]
    x, residual = (torch.randn(shape).to(dtype) for _ in range(2))
    x[..., 0] *= 30
    return x, torch.rand(K) * 40, torch.randn(K) * 3, residual


def exact_value(x, weight, bias, residual):
    """y in float64, and the error that float32 may make of it.

    Summing K values in any order errs by K roundings of the largest; so does the variance, and its
    root by half as much. The affine map adds two roundings.
    """
    K = x.shape[-1]
    h = (x.float() + residual.float()).double()
    mean, std = h.mean(-1, keepdim=True), (h.var(-1, keepdim=True, correction=0) + EPS).sqrt()
    xhat = (h - mean) / std
    error = K * ULP * h.abs().amax(-1, keepdim=True) / std
    error = error + xhat.abs() * (K + 8) * ULP
    y = xhat * weight + bias
    return y, weight.abs() * error + 4 * ULP * (y.abs() + bias.abs())


@pytest.mark.parametrize("backend", ["triton", "cpu", "reference"])
@pytest.mark.parametrize("output", OUTPUTS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 197), (5, 768), (2, 1025)], ids=str)
def test_codes_round_the_exact_value(shape, output, backend, assert_codes_agree):
    x, weight, bias, residual = inputs(*shape)
    q, scale, _ = layer_norm_quantize(
        x, weight, bias, EPS, output, residual=residual, backend=backend
    )
    y, tolerance = exact_value(x, weight, bias, residual)
    if not output.static:
        group = min(output.group_size(shape[-1]), shape[-1])
        step = scale.double().repeat_interleave(group, -1)[..., : shape[-1]]
        y, tolerance = y / step, tolerance / step + 8 * ULP * (y / step).abs()
    q = q.int() - output.added
    assert_codes_agree(q, y.round().clamp(output.qmin, output.qmax), y, tolerance)


@pytest.mark.parametrize("output", OUTPUTS, ids=str)
def test_several_rows_in_a_program(output, monkeypatch):
    args = inputs(13, 96)
    want = layer_norm_quantize(*args[:3], EPS, output, residual=args[3], backend="triton")
    monkeypatch.setattr(_launch, "SMS", 1)
    got = layer_norm_quantize(*args[:3], EPS, output, residual=args[3], backend="triton")
    assert torch.equal(got[0], want[0])


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("granularity", ["token", 32])
def test_scale_spans_the_largest_magnitude(granularity, backend):
    x, weight, bias, residual = inputs(5, 96)
    _, scale, _ = layer_norm_quantize(
        x, weight, bias, EPS, Codes(8, granularity), residual=residual, backend=backend
    )
    y, tolerance = exact_value(x, weight, bias, residual)
    groups = y.abs().unflatten(-1, (-1, 96 if granularity == "token" else granularity))
    assert ((scale * 127 - groups.amax(-1)).abs() <= 2 * tolerance.amax()).all()


@pytest.mark.parametrize("backend", ["triton", "cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_emitted_stream(dtype, backend):
    x, weight, bias, residual = inputs(4, 130, dtype=dtype)
    norm_weight, norm_bias = torch.rand(130), torch.randn(130)
    # one ulp of x's dtype, because the interpreter truncates instead of rounding
    ulp = torch.finfo(dtype).eps
    h = x.double() + residual.double()
    _, _, emitted = layer_norm_quantize(
        x, weight, bias, EPS, Codes(8), residual=residual, emit="sum", backend=backend
    )
    assert emitted.dtype == dtype and ((emitted - h).abs() <= ulp * h.abs()).all()
    y, tolerance = exact_value(x, norm_weight, norm_bias, residual)
    _, _, emitted = layer_norm_quantize(
        x, weight, bias, EPS, Codes(8), residual=residual, emit="norm", norm_weight=norm_weight,
        norm_bias=norm_bias, backend=backend,
    )  # fmt: skip
    assert emitted.dtype == dtype and ((emitted - y).abs() <= ulp * y.abs() + tolerance).all()


@pytest.mark.parametrize("output", [*OUTPUTS, Codes(4, packed=True)], ids=str)
def test_row_longer_than_a_tile(output):
    x, weight, bias, residual = inputs(2, 20001)
    args = {"residual": residual, "emit": "sum"}
    want = layer_norm_quantize(x, weight, bias, EPS, output, **args, backend="reference")
    got = layer_norm_quantize(x, weight, bias, EPS, output, **args, backend="triton")
    assert (got[0] != want[0]).float().mean() < 1e-3  # near ties only
    assert torch.equal(got[2], want[2])
    assert got[1] is want[1] is None or torch.allclose(got[1], want[1], rtol=20001 * ULP)


def test_groups_of_a_tile_in_a_longer_row():
    """Several scales, though a group fills the tile that a walk goes by."""
    x, weight, bias, _ = inputs(2, 12288)
    want = layer_norm_quantize(x, weight, bias, EPS, Codes(8, 4096), backend="reference")
    got = layer_norm_quantize(x, weight, bias, EPS, Codes(8, 4096), backend="triton")
    assert (got[0] != want[0]).float().mean() < 1e-3  # near ties only
    assert got[1].shape == (2, 3) and torch.allclose(got[1], want[1], rtol=12288 * ULP)


@pytest.mark.parametrize("backend", ["triton", "cpu"])
def test_variance_ignores_the_masked_channels(backend):
    x = torch.full((1, 130), 1000.0)
    x[0, ::2] = 1002.0
    q, _, _ = layer_norm_quantize(
        x, torch.full((130,), 10.0), torch.zeros(130), 0.0, Codes(8), backend=backend
    )
    assert q.unique().tolist() == [-10, 10]


@pytest.mark.parametrize("backend", ["triton", "cpu", "reference"])
def test_packed_codes_and_strides(backend):
    x, weight, bias, residual = inputs(6, 130)
    want = layer_norm_quantize(x, weight, bias, EPS, Codes(4, packed=True), backend="reference")[0]
    wide = torch.cat([x, x], -1)[:, :130]
    got = layer_norm_quantize(wide, weight, bias, EPS, Codes(4, packed=True), backend=backend)[0]
    assert torch.equal(got, want)
    columns = residual.T.contiguous().T
    a = layer_norm_quantize(x, weight, bias, EPS, Codes(4), residual=columns, backend=backend)[0]
    b = layer_norm_quantize(x, weight, bias, EPS, Codes(4), residual=residual, backend=backend)[0]
    assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["triton", "cpu", "reference"])
def test_empty_batch(backend):
    one = torch.ones(16)
    q, scale, emitted = layer_norm_quantize(
        torch.zeros(0, 16), one, one, EPS, Codes(8, "token"), emit="sum", backend=backend
    )
    assert q.shape == (0, 16) and scale.shape == (0, 1) and emitted.shape == (0, 16)


def test_errors_say_what_was_expected():
    x, one = torch.zeros(2, 8), torch.ones(8)
    with pytest.raises(ValueError, match=r"weight must be \[8\] for x \[2, 8\], got \[7\]"):
        layer_norm_quantize(x, torch.ones(7), one, EPS, Codes(8))
    with pytest.raises(ValueError, match=r"residual must be \[2, 8\] as x is, got \[1, 8\]"):
        layer_norm_quantize(x, one, one, EPS, Codes(8), residual=x[:1])
    with pytest.raises(ValueError, match=r"emit must be None or one of .* got 'both'"):
        layer_norm_quantize(x, one, one, EPS, Codes(8), emit="both")
    with pytest.raises(ValueError, match="needs norm_weight and norm_bias"):
        layer_norm_quantize(x, one, one, EPS, Codes(8), emit="norm")


@pytest.mark.parametrize("output", OUTPUTS, ids=str)
def test_compiles_to_one_graph(output):
    x, weight, bias, residual = inputs(4, 64)

    def run(x):
        return layer_norm_quantize(x, weight, bias, EPS, output, residual=residual, emit="sum")

    assert torch.equal(torch.compile(run, fullgraph=True, backend="eager")(x)[0], run(x)[0])


@pytest.mark.parametrize("K", [96, 20001])
def test_a_nan_is_seen_in_the_scale_of_its_token(K):
    x, weight, bias, _ = inputs(3, K)
    x[1, 40] = float("nan")
    for backend in ("triton", "reference"):
        _, scale, _ = layer_norm_quantize(x, weight, bias, EPS, Codes(8, "token"), backend=backend)
        assert scale.isnan().flatten().tolist() == [False, True, False]
