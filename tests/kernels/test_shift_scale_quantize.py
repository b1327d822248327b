import pytest
import torch

from qtk_kernels import _launch
from qtk_kernels.codes import Codes
from qtk_kernels.packing import unpack_int4
from qtk_kernels.shift_scale_quantize import shift_scale_quantize

OUTPUTS = [
    Codes(8),
    Codes(4, offset=8),
    Codes(4, packed=True),
    Codes(8, "token", clip=0.9),
    Codes(2, "token", offset=2),
    Codes(8, 32, offset=128),
    Codes(3, 128, packed=True, clip=0.8),
    Codes(4, 16, packed=True),
    Codes(4, 256, packed=True),
    Codes(8, 6),
    Codes(4, 20, packed=True),
]


def inputs(*shape, dtype=torch.float32, device="cpu"):
    K = shape[-1]
    x = torch.randn(shape, device=device).to(dtype)
    x[..., 0] *= 50  # one outlier channel, as transformers have
    return x, torch.rand(K, device=device) * 40, torch.randn(K, device=device)


@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 7), (2, 5, 197), (4, 130), (3, 768), (2, 1025)], ids=str
)
@pytest.mark.parametrize("output", OUTPUTS, ids=str)
def test_kernel_equals_reference(shape, output, device):
    args = inputs(*shape, device=device)
    q_ref, scale_ref = shift_scale_quantize(*args, output, backend="reference")
    q, scale = shift_scale_quantize(*args, output, backend="triton")
    assert torch.equal(q, q_ref) and q.dtype == q_ref.dtype
    assert scale is scale_ref is None or torch.equal(scale, scale_ref)


@pytest.mark.parametrize("output", OUTPUTS, ids=str)
def test_several_rows_in_a_program(output, monkeypatch, device):
    args = inputs(13, 96, device=device)
    monkeypatch.setattr(_launch, "SMS", 1)
    got = shift_scale_quantize(*args, output, backend="triton")
    want = shift_scale_quantize(*args, output, backend="reference")
    assert torch.equal(got[0], want[0])
    assert got[1] is want[1] is None or torch.equal(got[1], want[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("output", OUTPUTS[::3], ids=str)
def test_kernel_equals_reference_on_16_bits(dtype, output, device):
    args = inputs(6, 197, dtype=dtype, device=device)
    want = shift_scale_quantize(*args, output, backend="reference")
    got = shift_scale_quantize(*args, output, backend="triton")
    assert torch.equal(got[0], want[0])
    assert got[1] is want[1] is None or torch.equal(got[1], want[1])


@pytest.mark.parametrize("output", [OUTPUTS[0], OUTPUTS[3], OUTPUTS[5]], ids=str)
def test_row_longer_than_a_tile(output, device):
    args = inputs(2, 20001, device=device)
    want = shift_scale_quantize(*args, output, backend="reference")
    got = shift_scale_quantize(*args, output, backend="triton")
    assert torch.equal(got[0], want[0])
    assert got[1] is want[1] is None or torch.equal(got[1], want[1])


@pytest.mark.parametrize("backend", ["triton", "cpu", "reference"])
def test_nothing_to_multiply_or_add(backend):
    x = torch.tensor([[1.4, -2.6, 300.0, -300.0]])
    q, scale = shift_scale_quantize(x, None, None, Codes(8), backend=backend)
    assert q.tolist() == [[1, -3, 127, -128]] and scale is None
    assert x.tolist() != q.tolist()  # the input is not overwritten


@pytest.mark.parametrize("backend", ["triton", "cpu", "reference"])
def test_ties_go_to_even(backend):
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, -126.5]])
    for granularity in ("tensor", "token"):
        q, _ = shift_scale_quantize(x, None, None, Codes(8, granularity), backend=backend)
        assert q.tolist() == [[127, 0, 2, 2, 0, -2, 126, -126]]


@pytest.mark.parametrize("backend", ["triton", "cpu", "reference"])
def test_static_grid_uses_every_code(backend):
    x = torch.tensor([[-1e9, -8.4, 7.4, 1e9]])
    assert shift_scale_quantize(x, None, None, Codes(4), backend=backend)[0].tolist() == [
        [-8, -8, 7, 7]
    ]
    q, _ = shift_scale_quantize(x, None, None, Codes(4, offset=8), backend=backend)
    assert q.tolist() == [[0, 0, 7, 15]] and q.dtype == torch.uint8


@pytest.mark.parametrize("backend", ["triton", "cpu", "reference"])
def test_dynamic_grid_has_one_code_more_below_zero_where_it_clips(backend):
    x = torch.tensor([[-2.0, 1.0, 2.0, 0.0]])
    q, scale = shift_scale_quantize(x, None, None, Codes(8, "token"), backend=backend)
    assert q.tolist() == [[-127, 64, 127, 0]] and scale.item() == pytest.approx(2 / 127)
    q, _ = shift_scale_quantize(x, None, None, Codes(8, "token", offset=128), backend=backend)
    assert q.tolist() == [[1, 192, 255, 128]]
    q, scale = shift_scale_quantize(x, None, None, Codes(8, "token", clip=0.5), backend=backend)
    assert q.tolist() == [[-128, 127, 127, 0]] and scale.item() == pytest.approx(1 / 127)


@pytest.mark.parametrize("backend", ["triton", "cpu", "reference"])
def test_zero_token_is_zero_not_nan(backend):
    q, scale = shift_scale_quantize(
        torch.zeros(2, 8), None, None, Codes(8, "token"), backend=backend
    )
    assert (q == 0).all() and (scale > 0).all()


def test_error_is_at_most_half_a_step(device):
    x, multiplier, offset = inputs(64, 300, device=device)
    q, scale = shift_scale_quantize(x, multiplier, offset, Codes(8, 100))
    steps = scale.repeat_interleave(100, -1)
    error = (q * steps - (x * multiplier + offset)).abs()
    assert (error <= 0.5 * steps * (1 + 1e-4)).all()


def test_packed_is_the_packing_of_unpacked(device):
    x, multiplier, offset = inputs(5, 197, device=device)
    for granularity in ("tensor", "token", 64):
        packed, _ = shift_scale_quantize(
            x, multiplier, offset, Codes(4, granularity, packed=True), backend="triton"
        )
        q, _ = shift_scale_quantize(x, multiplier, offset, Codes(4, granularity))
        assert torch.equal(unpack_int4(packed, 197), q)


@pytest.mark.parametrize("backend", ["triton", "cpu"])
def test_strides_do_not_matter(backend, device):
    x, multiplier, offset = inputs(6, 64, device=device)
    want = shift_scale_quantize(x, multiplier, offset, Codes(8), backend="reference")[0]
    wide = torch.cat([x, x], -1)[:, :64]
    assert torch.equal(
        shift_scale_quantize(wide, multiplier, offset, Codes(8), backend=backend)[0], want
    )
    columns = x.T.contiguous().T
    twice = multiplier.repeat_interleave(2)[::2]
    assert torch.equal(
        shift_scale_quantize(columns, twice, offset, Codes(8), backend=backend)[0], want
    )


@pytest.mark.parametrize("backend", ["triton", "cpu", "reference"])
def test_empty_batch(backend):
    q, scale = shift_scale_quantize(
        torch.zeros(0, 16), None, None, Codes(8, "token"), backend=backend
    )
    assert q.shape == (0, 16) and scale.shape == (0, 1)


def test_errors_say_what_was_expected():
    x = torch.zeros(2, 8)
    with pytest.raises(ValueError, match=r"multiplier must be \[8\] for x \[2, 8\], got \[1, 8\]"):
        shift_scale_quantize(x, torch.zeros(1, 8), None, Codes(8))


@pytest.mark.parametrize("output", OUTPUTS, ids=str)
def test_compiles_to_one_graph(output):
    torch.compiler.reset()
    x, multiplier, offset = inputs(4, 130)
    compiled = torch.compile(
        lambda x: shift_scale_quantize(x, multiplier, offset, output),
        fullgraph=True, backend="eager",
    )  # fmt: skip
    assert torch.equal(compiled(x)[0], shift_scale_quantize(x, multiplier, offset, output)[0])


@pytest.mark.parametrize("backend", ["triton", "cpu", "reference"])
@pytest.mark.parametrize("codes", [
    Codes(8, "token"), Codes(8, 32), Codes(4, "token", packed=True), Codes(4, 128, packed=True),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("K", [256, 20001])
def test_a_nan_is_seen_in_the_scale_of_its_token_and_nowhere_else(codes, backend, K):
    x = torch.randn(3, K)
    _, want = shift_scale_quantize(x, None, None, codes, backend="reference")
    x[1, 40] = float("nan")
    _, scale = shift_scale_quantize(x, None, None, codes, backend=backend)
    hit = torch.zeros_like(want, dtype=torch.bool)
    hit[1, 40 // codes.group_size(K) if codes.granularity != "token" else 0] = True
    assert scale[hit].isnan().all() and torch.equal(scale[~hit], want[~hit])


@pytest.mark.parametrize("backend", ["triton", "cpu", "reference"])
def test_a_tensor_without_axes_is_named(backend):
    with pytest.raises(ValueError, match="got a tensor without axes"):
        shift_scale_quantize(torch.tensor(1.0), None, None, Codes(8), backend=backend)
