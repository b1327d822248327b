"""What CUDA graphs and torch.compile ask of the ops: shapes without values, no wait for a GPU."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qtk_kernels import (
    _plan,
    _split_k,
    dispatch,
    fp8_linear,
    hadamard_quantize,
    heads_quantize,
    int4_linear,
    int8_linear,
    layer_norm_quantize,
    quantized_attention,
    shift_scale_quantize,
    weight_only_linear,
)
from qtk_kernels.codes import Codes
from qtk_kernels.packing import packed_width

M, N, K = 5, 24, 256
KERNELS = [
    (_split_k, "_add_parts_kernel"),
    (fp8_linear, "_fp8_linear_kernel"),
    (hadamard_quantize, "_hadamard_quantize_kernel"),
    (heads_quantize, "heads_quantize_kernel"),
    (int4_linear, "gemv_integers_kernel"),
    (weight_only_linear, "gemv_floats_kernel"),
    (int4_linear, "_int4_linear_kernel"),
    (int8_linear, "_int8_linear_kernel"),
    (layer_norm_quantize, "_layer_norm_quantize_kernel"),
    (quantized_attention, "quantized_attention_kernel"),
    (shift_scale_quantize, "_shift_scale_quantize_kernel"),
    (weight_only_linear, "_weight_only_linear_kernel"),
]


@pytest.fixture(autouse=True)
def _float32_on_the_cpu(monkeypatch):
    """oneDNN's blocked weights have no fake form; tests/test_compile.py compiles models on them."""
    monkeypatch.setenv("QTK_CPU_INT8", "0")


def calls():
    """Every op with arguments made by `make(*shape, dtype)`: {name: run(make)}."""
    f32, i8, u8, e4m3 = torch.float32, torch.int8, torch.uint8, torch.float8_e4m3fn
    half, packed = torch.bfloat16, packed_width(K)

    def quantizer(op, *more, vectors=2, **options):
        return lambda make, backend: op(
            make(M, K, half), *(make(K, f32) for _ in range(vectors)), *more,
            Codes(8, "token", clip=0.9), backend=backend, **options,
        )  # fmt: skip

    def linear(op, x, w, groups=1, token=True, **options):
        return lambda make, backend: op(
            make(M, *x), make(N, *w), make(N, groups, f32), make(N, f32),
            **({"x_scale": make(M, 1, f32)} if token else {}), backend=backend, **options,
        )  # fmt: skip

    grouped = {"in_features": K, "group_size": 128}
    return {
        "shift_scale": quantizer(shift_scale_quantize.shift_scale_quantize),
        "gelu": quantizer(shift_scale_quantize.shift_scale_quantize, activation="gelu"),
        "layer_norm": quantizer(layer_norm_quantize.layer_norm_quantize, 1e-5),
        "hadamard": quantizer(hadamard_quantize.hadamard_quantize, block=64),
        "W8A8": linear(int8_linear.int8_linear, (K, i8), (K, i8)),
        "W8A8, codes out": linear(
            int8_linear.int8_linear, (K, i8), (K, i8), out_codes=Codes(4, offset=8), out_step=0.5,
            out_zero_point=3,
        ),
        "W4A8": linear(int4_linear.int4_linear, (K, i8), (packed, u8), 2, **grouped),
        "W4A4": linear(
            int4_linear.int4_linear, (packed, u8), (packed, u8), in_features=K, x_packed=True
        ),
        "fp8": linear(fp8_linear.fp8_linear, (K, e4m3), (K, e4m3)),
        "W4A16": linear(
            weight_only_linear.weight_only_linear, (K, half), (packed, u8), 2, False, bits=4,
            **grouped,
        ),
        "one token of W4A8": lambda make, backend: int4_linear.int4_linear(
            make(1, K, i8), make(N, packed, u8), make(N, 1, f32), make(N, f32),
            x_scale=make(1, 1, f32), in_features=K, backend=backend,
        ),
        "two tokens of W4A16": lambda make, backend: weight_only_linear.weight_only_linear(
            make(2, K, half), make(N, packed, u8), make(N, 2, f32), make(N, f32), bits=4,
            backend=backend, **grouped,
        ),
        "heads": lambda make, backend: heads_quantize.heads_quantize(
            *(make(2, 3, 16, 20, half) for _ in range(3)), make(3, 20, f32), 8, transposed=True,
            backend=backend,
        ),
        "attention": lambda make, backend: quantized_attention.quantized_attention(
            *(make(2, 3, M, 32, i8) for _ in range(2)), make(2, 3, M, 32, half),
            q_scale=make(2, 3, M, f32), k_scale=make(2, 3, M, f32), softmax="code", steps=4,
            mask=make(2, 1, 1, M, torch.bool), backend=backend,
        ),
        "residual": lambda make, backend: layer_norm_quantize.layer_norm_quantize(
            make(M, K, half), make(K, f32), make(K, f32), 1e-5, Codes(8),
            residual=make(M, K, half), emit="sum", backend=backend,
        ),
        "packed apart": lambda make, backend: shift_scale_quantize.shift_scale_quantize(
            make(M, K, half), None, None, Codes(4, 100, packed=True), backend=backend
        ),
        "residual packed apart": lambda make, backend: layer_norm_quantize.layer_norm_quantize(
            make(M, K, half), make(K, f32), make(K, f32), 1e-5, Codes(4, 100, packed=True),
            residual=make(M, K, half), emit="sum", backend=backend,
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

    for module, name in KERNELS:
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


def compiled_and_eager(name, backend):
    torch.compiler.reset()
    made = []

    def make(*shape_and_dtype):
        made.append(random(*shape_and_dtype))
        return made[-1]

    want = CALLS[name](make, backend)

    def run(tensors):
        rest = iter(tensors)
        return CALLS[name](lambda *_: next(rest), backend)

    got = torch.compile(run, fullgraph=True, backend="aot_eager")(made)
    return zip(*(r if isinstance(r, tuple) else (r,) for r in (got, want)), strict=True)


def random(*shape_and_dtype):
    *shape, dtype = shape_and_dtype
    if dtype.is_floating_point:
        return torch.randn(shape).to(dtype)
    return torch.randint(0, 2 if dtype == torch.bool else 8, shape).to(dtype)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("name", CALLS)
def test_compiles_to_one_graph(name, backend):
    """On triton the op is one node: the compiler knows its shapes and runs the kernel as it is."""
    for a, b in compiled_and_eager(name, backend):
        assert a is b is None or torch.equal(a, b)


def test_a_compiled_op_is_one_node_of_any_number_of_tokens():
    """Sizes that the compiler does not know never reach a plan."""
    torch.compiler.reset()
    graphs = []

    def count(graph, _):
        targets = [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]
        graphs.append([target for target in targets if "getattr" not in target])
        return graph

    def run(x, w, scale):
        return int8_linear.int8_linear(x, w, scale, backend="triton")

    compiled = torch.compile(run, fullgraph=True, backend=count, dynamic=True)
    w, scale = random(N, K, torch.int8), torch.rand(N, 1)
    for tokens in (3, 5, 9):
        x = random(tokens, K, torch.int8)
        assert torch.equal(compiled(x, w, scale), run(x, w, scale))
    assert graphs == [["qtk.int8_linear.default"]]


@pytest.mark.parametrize("name", CALLS)
def test_registrations_hold(name, monkeypatch):
    """Schema, aliasing and fake shapes of every op, by torch's own check."""
    seen = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen.extend([(op, args)] * (op.namespace == "qtk"))
            return op(*args, **(kwargs or {}))

    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with Spy():
        CALLS[name](random, "triton")
    monkeypatch.undo()
    ((op, args),) = seen
    checks = ["test_schema", "test_faketensor"]
    # the first compares tensors in ways that float8 has no arithmetic for
    torch.library.opcheck(op, args, test_utils=checks[1:] if name == "fp8" else checks)


def dtypes_of(name):
    """Of the tensors that a call of that name takes, in their order."""
    made = []
    CALLS[name](lambda *what: made.append(what[-1]) or empty(*what), "reference")
    return made


def changed(at, change):
    """Makes tensors, and the one of that number otherwise."""
    numbers = iter(range(100))
    return lambda *what: change(*what) if next(numbers) == at else empty(*what)


OPERANDS = [(name, i, dtype) for name in CALLS for i, dtype in enumerate(dtypes_of(name))]


@pytest.mark.parametrize("name, at", [(name, i) for name, i, _ in OPERANDS if i])
def test_an_operand_on_another_device_is_refused(stubbed, name, at):
    def elsewhere(*what):
        return torch.empty(what[:-1], dtype=what[-1], device="cuda:0")

    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        pytest.raises(ValueError, match=r"x is on cpu and an operand of .* is on cuda:0: move it"),
    ):
        CALLS[name](changed(at, elsewhere), "triton")
    assert not stubbed


@pytest.mark.parametrize("name, at", [
    (name, i) for name, i, dtype in OPERANDS
    if dtype in (torch.float32, torch.bfloat16)
])  # fmt: skip
def test_float64_is_refused(stubbed, name, at):
    """In place of any float: a kernel would compute in it, slowly, and differ from others."""
    with pytest.raises(ValueError, match="computes in float32, got float64"):
        CALLS[name](changed(at, lambda *what: empty(*what[:-1], torch.float64)), "triton")
    assert not stubbed


def test_a_plan_is_made_once_and_errors_every_time(stubbed):
    x, w, scale = random(M, K, torch.int8), random(N, K, torch.int8), torch.rand(N, 1)
    for _ in range(3):
        int8_linear.int8_linear(x, w, scale, backend="triton")
        with pytest.raises(ValueError, match="operand must be"):
            int8_linear.int8_linear(x, w[:, 1:], scale, backend="triton")
    assert len(stubbed) == 3
    assert int8_linear._plan.cache_info().currsize == 1
    _plan.forget()
    assert int8_linear._plan.cache_info().currsize == 0


def test_the_current_device_is_not_made_current_again(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(dispatch, "_check_card", lambda index: None)

    class OnGpu:
        dtype = torch.float32

        def __init__(self, index):
            self.get_device = lambda: index

    assert dispatch.on_device(OnGpu(1)) is dispatch.on_device(torch.zeros(1))
    assert isinstance(dispatch.on_device(OnGpu(0)), torch.cuda.device)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_a_graph_is_made_for_each_codes(backend):
    """A compiler that takes their numbers for sizes would ask for the sign of an unknown one."""
    torch.compiler.reset()
    x = torch.randn(M, K)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x, codes):
        return shift_scale_quantize.shift_scale_quantize(x, None, None, codes, backend=backend)

    for codes in (Codes(8, "token"), Codes(8, "token", clip=0.9), Codes(4, "token"), Codes(4, 32),
                  Codes(4, 64), Codes(4, "token", offset=8)):  # fmt: skip
        want = shift_scale_quantize.shift_scale_quantize(x, None, None, codes, backend="reference")
        assert all(map(torch.equal, run(x, codes), want))
