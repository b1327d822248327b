import itertools

import pytest
import torch

from qtk_kernels._attention_ref import unpack_heads
from qtk_kernels._softmax import Softmax, anchored, bytes_of, fma, probabilities_ref
from qtk_kernels.quantized_attention import WHOLE, pack_heads, quantized_attention
from tests.gpu.attention import KINDS, operands, slack, step_of

FLOAT = {"softmax": "float"}
ULP = 2.0**-24


def both(args, **options):
    return (quantized_attention(*args, **options, backend=b) for b in ("triton", "reference"))


SHAPES = [(1, 1, 1, 1, 1), (2, 2, 37, 37, 20), (1, 2, 5, 131, 64), (1, 1, 65, 70, 128)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("operand", ["float", "int8", "int4", "fp8"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: "-".join(map(str, k.values())))
def test_kernel_equals_reference(shape, operand, kind, device):
    if operand == "fp8" and not (
        kind["softmax"] == "code" or (kind["softmax"] == "log2" and kind["bits"] == 4)
    ):
        pytest.skip("float8 goes with logarithmic codes")
    args, scales = operands(*shape, operand, device)
    options = {**kind, **scales, **step_of(kind["softmax"], shape[1], device)}
    got, want = both(args, **options)
    assert got.shape == (shape[0], shape[2], shape[1] * shape[4])
    assert ((got - want).abs() <= slack(args, options, kind)).all()


@pytest.mark.parametrize("kind", [FLOAT, KINDS[1], KINDS[4], KINDS[9]], ids=lambda k: k["softmax"])
@pytest.mark.parametrize("causal", [False, True])
def test_masks_causal_and_rows_that_see_nothing(kind, causal, device):
    B, H, T, D = 3, 2, 33, 16
    args, scales = operands(B, H, T, T, D, "int8", device)
    mask = torch.ones(B, 1, 1, T, dtype=torch.bool, device=device)
    mask[1, ..., 20:] = False
    mask[2] = False
    for block_n in (None, 16):
        options = {**kind, **scales, "mask": mask, "causal": causal, "block_n": block_n}
        got, want = both(args, **options)
        limit = slack(args, {k: x for k, x in options.items() if k != "block_n"}, kind)
        assert ((got - want).abs() <= limit).all()
        assert (got[2] == 0).all() and (want[2] == 0).all()
    hidden = [args[0], args[1].clone(), args[2].clone()]
    hidden[1][1, :, 20:], hidden[2][1, :, 20:] = 99, 99
    again = quantized_attention(*hidden, **options, backend="triton")
    assert torch.equal(again, got)


@pytest.mark.parametrize("causal", [False, True])
def test_float_is_attention(causal):
    q, k, v = operands(2, 3, 17, 29, 24, "float")[0]
    mask = torch.rand(2, 1, 17, 29) > 0.3
    mask[..., 0] = True
    allowed = mask & torch.ones(17, 29, dtype=torch.bool).tril(29 - 17) if causal else mask
    want = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), attn_mask=allowed
    )
    for backend in ("triton", "cpu"):
        got = quantized_attention(q, k, v, mask=mask, causal=causal, backend=backend)
        assert torch.allclose(got.double(), want.transpose(1, 2).flatten(2), atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_one_pass_codes_equal_the_definition_bit_for_bit_in_any_tiles_and_order(steps):
    """Integers in v and scores within 8 octaves: no float32 addition rounds, so that codes and
    anchors are all that is left to differ."""
    B, H, T, D = 1, 2, 96, 32
    q = torch.randint(-3, 4, (B, H, 40, D)).to(torch.int8)
    k = torch.randint(-3, 4, (B, H, T, D)).to(torch.int8)
    v = torch.randint(-7, 8, (B, H, T, D)).to(torch.int8)
    spread = (q.float() @ k.float().mT).abs().amax(-1)  # [B, H, 40]
    scales = {"q_scale": 4 / 1.4427 / spread, "k_scale": torch.ones(1, 1, 1), "scale": 1.0}
    options = {"softmax": "code", "steps": steps, "grid": True, **scales}
    want = quantized_attention(q, k, v, **options, backend="reference")
    orders = [torch.arange(T), torch.arange(T).flip(0), torch.randperm(T)]
    for block_n, order in itertools.product((16, 32, 64, 128), orders):
        got = quantized_attention(
            q, k[:, :, order], v[:, :, order], **options, block_n=block_n, backend="triton"
        )
        assert torch.equal(got, want)
    fp8 = v.to(torch.float8_e4m3fn)
    got = quantized_attention(q, k, fp8, **options, block_n=32, backend="triton")
    assert torch.equal(got, want)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_later_integer_maximum_moves_no_code(steps):
    t = torch.rand(4096) * 25 * steps
    for octaves in (0, 1, 3):
        early, late = (
            bytes_of(fma(t - 25 * steps, torch.tensor(1.0).double(),
                         anchored(torch.tensor(float(steps * n)), steps, True)), steps).int()
            for n in (0, octaves)
        )  # fmt: skip
        assert torch.equal(late, (early - 4 * octaves).clamp(min=0)) or octaves > 2
        kept = early >= 4 * octaves
        assert torch.equal(late[kept], early[kept] - 4 * octaves)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_code_is_the_nearest_step_of_the_logarithm(steps):
    t = -torch.arange(0, 29 * steps, dtype=torch.float32)  # whole steps below the maximum
    x = fma(t, torch.tensor(1.0).double(), anchored(torch.zeros(()), steps, False))
    values = bytes_of(x, steps).view(torch.float8_e5m2).float() / 2**15
    octave, part = (-t) // steps, (-t) % steps
    linear = torch.where(part == 0, 1.0, (2 - part / steps) / 2)
    assert torch.equal(values, linear * 2.0**-octave)


def test_code_normalises_by_its_own_sum():
    (q, k, _), scales = operands(1, 2, 9, 50, 16, "int8")
    del scales["v_scale"]
    ones = torch.ones(1, 2, 50, 16, dtype=torch.int8)
    for steps, grid in itertools.product((1, 2, 4), (False, True)):
        options = {"softmax": "code", "steps": steps, "grid": grid, "backend": "triton"}
        got = quantized_attention(q, k, ones, **scales, **options)
        assert torch.allclose(got, torch.ones_like(got), rtol=0, atol=4 * ULP)


def test_quarter_steps_are_finer_than_half_steps_and_whole_ones():
    q, k, v = operands(1, 4, 64, 197, 64, "float")[0]
    exact = quantized_attention(q, k, v)
    errors = [
        float((quantized_attention(q, k, v, softmax="code", steps=s) - exact).norm() / exact.norm())
        for s in (1, 2, 4)
    ]
    assert errors[2] < 0.6 * errors[1] < 0.36 * errors[0]
    grid = quantized_attention(q, k, v, softmax="code", steps=4, grid=True)
    assert errors[2] < float((grid - exact).norm() / exact.norm())  # the exact maximum helps


@pytest.mark.parametrize("groups", [1, 4, 8, 32])
def test_scales_in_groups_of_tokens(groups):
    (q, k, v), scales = operands(2, 2, 32, 32, 16, "int8")
    scales["q_scale"] = torch.rand(2, 2, groups) * 0.01 + 0.005
    scales["k_scale"] = torch.rand(1, 2, groups) * 0.01 + 0.005
    got, want = both((q, k, v), **scales, softmax="code", steps=4)
    assert torch.allclose(got, want, rtol=0, atol=1e-6)
    per_token = {
        name: scales[name].repeat_interleave(32 // groups, -1) for name in ("q_scale", "k_scale")
    }
    assert torch.equal(quantized_attention(q, k, v, **{**scales, **per_token}, softmax="code",
                       steps=4), want)  # fmt: skip


def test_v_may_be_stored_transposed_and_views_need_no_copy():
    qkv = torch.randint(-127, 128, (2, 24, 3, 2, 32)).to(torch.int8)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    scales = {"q_scale": torch.full((1, 1, 1), 0.01), "k_scale": torch.full((1, 1, 1), 0.01)}
    got, want = both((q, k, v), **scales, softmax="uniform")
    assert torch.equal(got, want)
    stored = v.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(
        quantized_attention(q, k, stored, **scales, softmax="uniform", backend="triton"), want
    )


def test_longer_than_a_tile(device):
    args, scales = operands(1, 1, 3, WHOLE + 77, 16, "int8", device)
    for kind in (FLOAT, KINDS[1], KINDS[4], {"softmax": "code", "steps": 4}):
        options = {**kind, **scales}
        got, want = both(args, **options)
        assert ((got - want).abs() <= slack(args, options, kind)).all()


def test_packing_heads_inverts():
    for D in (1, 7, 16, 64, 127):
        q = torch.randint(-8, 8, (2, 3, D)).to(torch.int8)
        packed = pack_heads(q)
        assert packed.shape == (2, 3, -(-D // 2)) and torch.equal(unpack_heads(packed, D), q)


def test_log2_is_exact_to_its_definition():
    t = torch.tensor([[0.0, -1.0, -2.0, -3.0, -3.0]])  # sums to 2: p = 1/2, 1/4, ...
    values, total = probabilities_ref(t, Softmax("log2", bits=2))
    assert values.tolist() == [[0.5, 0.25, 0, 0, 0]] and total.tolist() == [[1.0]]
    _, total = probabilities_ref(t, Softmax("log2", bits=4, renormalize=True))
    assert total.tolist() == [[1.0]]


def test_uniform_grid_is_exact_to_its_definition():
    t = torch.tensor([[0.0, 0.0, -1.0, -1.0]])  # p = 1/3, 1/3, 1/6, 1/6
    values, total = probabilities_ref(t, Softmax("uniform", bits=4))
    assert values.tolist() == [[5, 5, 2, 2]] and torch.allclose(total, torch.tensor(15.0))
    values, total = probabilities_ref(t, Softmax("matthew", bits=2), torch.tensor(0.1))
    assert values.tolist() == [[3, 3, 2, 2]] and torch.allclose(total, torch.tensor(10.0))


def test_empty_batches_and_no_keys():
    q = torch.zeros(0, 2, 4, 8)
    assert quantized_attention(q, q, q).shape == (0, 4, 16)


@pytest.mark.parametrize(
    "change, told",
    [
        ({"softmax": "sqrt"}, "softmax must be one of"),
        ({"softmax": "code", "steps": 3}, "steps must be one of"),
        ({"softmax": "uniform", "bits": 9}, "bits must be 2 to 8"),
        ({"softmax": "matthew"}, "step .H. goes with"),
        ({"softmax": "matthew", "step": torch.ones(3)}, r"step must be \[2\]"),
        ({"q_scale": None}, "codes need a scale"),
        ({"q_scale": torch.ones(2, 2, 5)}, r"q_scale must be \[B, H, G\]"),
        ({"v_scale": torch.ones(2, 2, 5)}, "v_scale must be"),
        ({"mask": torch.zeros(1)}, "mask must be bool"),
        ({"k": torch.zeros(2, 2, 8, 15, dtype=torch.int8)}, "do not fit"),
        ({"k": torch.zeros(2, 2, 8, 16)}, "of one kind"),
        ({"v": torch.zeros(2, 2, 8, 16).to(torch.float8_e4m3fn), "v_scale": None}, "float8_e4m3fn"),
    ],
    ids=str,
)  # fmt: skip
def test_errors_say_what_was_expected(change, told):
    (q, k, v), scales = operands(2, 2, 8, 8, 16, "int8")
    options = {"q": q, "k": k, "v": v, **scales, **change}
    with pytest.raises(ValueError, match=told):
        quantized_attention(options.pop("q"), options.pop("k"), options.pop("v"), **options)


def test_compiles_to_one_graph():
    args, scales = operands(1, 2, 9, 9, 16, "int8")

    def run(q, k, v):
        return quantized_attention(q, k, v, **scales, softmax="code", steps=4)

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*args), run(*args))


def test_the_steps_of_heads_may_have_any_strides():
    args, scales = operands(1, 3, 5, 20, 16, "float")
    step = torch.linspace(0.004, 0.02, 6)[::2]
    options = {"softmax": "matthew", "bits": 6, "step": step}
    got, want = both(args, **options, **scales)
    assert ((got - want).abs() <= slack(args, options, {"softmax": "matthew", "bits": 6})).all()
