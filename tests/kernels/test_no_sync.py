"""What CUDA graphs and torch.compile ask of the ops: shapes without values, no wait for a GPU."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qtk_kernels import (
    _split_k,
    fp8_linear,
    hadamard_quantize,
    int4_linear,
    int8_linear,
    layer_norm_quantize,
    shift_scale_quantize,
    weight_only_linear,
)
from qtk_kernels._int4 import packed_width
from qtk_kernels.gelu_quantize import activation_quantize

M, N, K = 5, 24, 256
KERNELS = {
    _split_k: "_add_parts_kernel",
    fp8_linear: "_fp8_linear_kernel",
    hadamard_quantize: "_hadamard_quantize_kernel",
    int4_linear: "_int4_linear_kernel",
    int8_linear: "_int8_linear_kernel",
    layer_norm_quantize: "_layer_norm_quantize_kernel",
    shift_scale_quantize: "_shift_scale_quantize_kernel",
    weight_only_linear: "_weight_only_linear_kernel",
}


def calls():
    """Every op with arguments made by `make(*shape, dtype)`: {name: run(make)}."""
    f32, i8, u8, e4m3 = torch.float32, torch.int8, torch.uint8, torch.float8_e4m3fn
    half, packed = torch.bfloat16, packed_width(K)

    def quantizer(op, *more, vectors=2, **options):
        return lambda make, backend: op(
            make(M, K, half), *(make(K, f32) for _ in range(vectors)), *more,
            bits=8, granularity="token", backend=backend, **options,
        )  # fmt: skip

    def linear(op, x, w, groups=1, token=True, **options):
        return lambda make, backend: op(
            make(M, *x), make(N, *w), make(N, groups, f32), make(N, f32),
            **({"x_scale": make(M, 1, f32)} if token else {}), backend=backend, **options,
        )  # fmt: skip

    grouped = {"in_features": K, "group_size": 128}
    return {
        "shift_scale": quantizer(shift_scale_quantize.shift_scale_quantize),
        "gelu": quantizer(activation_quantize, activation="gelu"),
        "layer_norm": quantizer(layer_norm_quantize.layer_norm_quantize, 1e-5),
        "hadamard": quantizer(hadamard_quantize.hadamard_quantize, block=64),
        "W8A8": linear(int8_linear.int8_linear, (K, i8), (K, i8)),
        "W4A8": linear(int4_linear.int4_linear, (K, i8), (packed, u8), 2, **grouped),
        "W4A4": linear(
            int4_linear.int4_linear, (packed, u8), (packed, u8), in_features=K, x_packed=True
        ),
        "fp8": linear(fp8_linear.fp8_linear, (K, e4m3), (K, e4m3)),
        "W4A16": linear(
            weight_only_linear.weight_only_linear, (K, half), (packed, u8), 2, False, bits=4,
            **grouped,
        ),
    }  # fmt: skip


CALLS = calls()


def empty(*shape_and_dtype):
    *shape, dtype = shape_and_dtype
    return torch.zeros(shape, dtype=dtype)


def kinds(result):
    """Shapes and dtypes of what an op returned."""
    results = result if isinstance(result, tuple) else (result,)
    return [None if t is None else (t.shape, t.dtype) for t in results]


@pytest.fixture
def stubbed(monkeypatch):
    """Kernels that do nothing, and the list of those that were launched."""
    launched = []

    class Stub:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            assert all(isinstance(n, int) and n > 0 for n in grid)
            return lambda *args, **options: launched.append(self.name)

    for module, name in KERNELS.items():
        monkeypatch.setattr(module, name, Stub(name))
    return launched


@pytest.mark.parametrize("name", CALLS)
def test_a_launch_never_reads_a_tensor(stubbed, name):
    """Fake tensors have no values: a launcher that asks for one raises."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        faked = kinds(CALLS[name](empty, "triton"))
    assert stubbed
    assert faked == kinds(CALLS[name](empty, "reference"))


@pytest.mark.parametrize("name", CALLS)
def test_shapes_and_dtypes_are_known_without_values(name):
    with FakeTensorMode(allow_non_fake_inputs=True):
        faked = kinds(CALLS[name](empty, "cpu"))
    assert faked == kinds(CALLS[name](empty, "cpu"))


@pytest.mark.parametrize("name", CALLS)
def test_compiles_to_one_graph(name):
    torch.compiler.reset()
    made = []

    def make(*shape_and_dtype):
        made.append(empty(*shape_and_dtype))
        return made[-1]

    want = CALLS[name](make, "cpu")

    def run(tensors):
        rest = iter(tensors)
        return CALLS[name](lambda *_: next(rest), "cpu")

    got = torch.compile(run, fullgraph=True, backend="eager")(made)
    for a, b in zip(*(r if isinstance(r, tuple) else (r,) for r in (got, want)), strict=True):
        assert a is b is None or torch.equal(a, b)
