"""Attention at random shapes: the cases that `check` draws of it."""

import random
from typing import Any

import torch
from torch import Tensor

from qtk_kernels._softmax import OFFSET
from qtk_kernels.quantized_attention import attention_weights, pack_heads, quantized_attention
from tests.gpu import cases
from tests.gpu.compare import ULP, both, near

Case = tuple[tuple[Tensor, ...], dict[str, Any]]  # q, k and v, and options
OPERANDS = ("float", "int8", "int4", "fp8")
KINDS: list[dict[str, Any]] = [
    {"softmax": "float"},
    {"softmax": "uniform", "bits": 8},
    {"softmax": "uniform", "bits": 4, "renormalize": True},
    {"softmax": "matthew", "bits": 6},
    {"softmax": "log2", "bits": 4},
    {"softmax": "log2", "bits": 5, "steps": 2, "renormalize": True},
    *({"softmax": "code", "steps": steps} for steps in (1, 2, 4)),
    {"softmax": "code", "steps": 4, "grid": True},
]


def codes(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(-1).clamp(min=1e-8) / (2 ** (bits - 1) - 1)
    return (x / scale[..., None]).round().to(torch.int8), scale


def operands(
    B: int, H: int, Tq: int, Tk: int, D: int, kind: str, device: str = "cpu"
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """q, k, v and their scales: floats, int8, packed int4, or int8 with v in float8."""
    q, k, v = (torch.randn(B, H, T, D, device=device) for T in (Tq, Tk, Tk))
    if kind == "float":
        return (q, k, v), {}
    q, k = q * 2, k * 2
    bits = 4 if kind == "int4" else 8
    (q, q_scale), (k, k_scale) = codes(q, bits), codes(k, bits)
    if kind == "int4":
        q, k = pack_heads(q), pack_heads(k)
    scales = {"q_scale": q_scale, "k_scale": k_scale}
    if kind == "fp8":
        return (q, k, v.to(torch.float8_e4m3fn)), scales
    v, v_scale = codes(v.transpose(2, 3), bits)
    return (q, k, v.transpose(2, 3)), {**scales, "v_scale": v_scale}


def sentences(
    spans: list[tuple[int, int]], T: int, H: int, D: int, operand: str, causal: bool,
    device: str = "cpu", dtype: torch.dtype = torch.float32,
) -> tuple[Case, Case, Tensor]:  # fmt: skip
    """Sentences padded to T places with a mask, the same one after another, and where those were.

    Args:
        spans: the places of each that are tokens, first and past the last.
    """
    (q, k, v), scales = operands(len(spans), H, T, T, D, operand, device)
    if operand == "float":
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    place = torch.arange(T, device=device)
    there = torch.stack([(place >= first) & (place < end) for first, end in spans])
    rows = there.flatten().nonzero()[:, 0]

    def pack(x: Tensor) -> Tensor:
        """[S, H, T, ...] to [1, H, N, ...], as views of a model's tensors are."""
        bytes_ = x.view(torch.uint8) if x.itemsize == 1 else x
        flat = bytes_.transpose(1, 2).flatten(0, 1)[rows]
        return flat.transpose(0, 1)[None].view(x.dtype)

    starts, row = [], 0
    for first, end in spans:
        starts.append([row, first, end])
        row += end - first
    of_tokens: dict[str, Any] = {n: scales[n] for n in ("q_scale", "k_scale") if n in scales}
    fixed = {"v_scale": scales["v_scale"].amax(0, keepdim=True)} if "v_scale" in scales else {}
    mask = there[:, None, None]
    if causal:
        mask = mask & torch.ones(T, T, dtype=torch.bool, device=device).tril()
    sequences = torch.tensor(starts, dtype=torch.int32, device=device)
    return (
        ((q, k, v), {**of_tokens, **fixed, "mask": mask}),
        ((pack(q), pack(k), pack(v)),
         {**{name: pack(x) for name, x in of_tokens.items()}, **fixed, "sequences": sequences,
          "longest": T, "causal": causal}),
        rows,
    )  # fmt: skip


def step_of(kind: str, H: int, device: str = "cpu") -> dict[str, Tensor]:
    return {"step": torch.linspace(0.004, 0.02, H, device=device)} if kind == "matthew" else {}


def slack(args: tuple[Tensor, ...], options: dict[str, Any], kind: dict[str, Any]) -> Tensor:
    """How far outputs may be apart: float32 sums, and codes whose exact value is near a boundary.

    A probability is within 2**-17 (exp2, log2 and sums, relative) of the exact one, so a code
    differs only that near to a boundary, and then by one step of its grid.
    """
    v = args[2].float().abs()
    if options.get("v_scale") is not None:
        v = v * options["v_scale"][..., None, :]
    weights = {k: x for k, x in options.items() if k not in ("softmax", "bits", "steps",
               "renormalize", "step", "v_scale", "grid")}  # fmt: skip
    as_float = (args[0], args[1], args[2].float())
    p = attention_weights(*as_float, **weights).double()
    T, name, steps = p.shape[-1], kind["softmax"], kind.get("steps", 1)
    change = p * (T + args[2].shape[-1] + 64) * ULP
    if args[2].dtype in cases.DTYPES[1:]:  # rounded below another maximum, here and there
        change = change + p * torch.finfo(args[2].dtype).eps
    if args[2].dtype == torch.int8 and name in ("float", "log2"):
        change = change + p * 2**-11  # rounded to float16 before or after a scale of 2**-n
    if name in ("uniform", "matthew"):
        step = options.get(
            "step", torch.ones(p.shape[1], device=p.device) / (2 ** kind["bits"] - 1)
        )
        y = p / step[:, None, None]
        unsure = ((y - y.floor()) - 0.5).abs() < 2**-17 * (1 + y)
        change = change + unsure * step[:, None, None]
    elif name == "log2":
        y = -steps * p.clamp(min=1e-30).log2()
        unsure = ((y - y.floor()) - 0.5).abs() < 2**-16 * (1 + y)
        change = change + unsure * p
    elif name == "code" and args[0].is_floating_point():  # scores are sums in another order
        u = p.clamp(min=1e-30).log2()
        u = (u - u.amax(-1, keepdim=True)) * steps + 0.5 - OFFSET[steps]
        unsure = ((u - u.floor()) - 0.5).abs() > 0.5 - 2**-14
        change = change + unsure * p
    worst = (change.sum(-1, keepdim=True) * p + change) * 2  # through the divisor, and directly
    y = worst.float() @ v
    return y.transpose(1, 2).flatten(2) + 1e-6


def operand_and_kind(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """What a card multiplies, and a softmax that goes with it."""
    known = OPERANDS if cases.multiplies_fp8() else OPERANDS[:3]
    operand, kind = rng.choice(known), rng.choice(KINDS)
    if operand == "fp8" and not takes_fp8(kind):
        kind = {"softmax": "code", "steps": rng.choice([1, 2, 4])}
    return operand, kind


def attention(rng: random.Random, device: str) -> None:
    """Any operands, kinds of softmax, masks and lengths, in views as a model makes them."""
    operand, kind = operand_and_kind(rng)
    Tq, Tk = (rng.choice([1, 2, 17, 64, 65, rng.randint(1, cases.LONGEST)]) for _ in range(2))
    D = rng.choice(cases.HEADS)
    B, H = rng.choice([(1, 1), (2, 1), (1, 3), (2, 2)])
    args, scales = operands(B, H, Tq, Tk, D, operand, device)
    if operand == "float":
        dtype = rng.choice(cases.DOTS)
        args = tuple(x.to(dtype) for x in args)
    options: dict[str, Any] = {**kind, **scales, **step_of(kind["softmax"], H, device)}
    if rng.random() < 0.4:
        shape = rng.choice([(B, 1, 1, Tk), (B, H, Tq, Tk), (Tk,)])
        options["mask"] = torch.rand(shape, device=device) < 0.8
    options["causal"] = rng.random() < 0.3
    if rng.random() < 0.5:  # [B, T, H, D] seen as [B, H, T, D]
        args = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in args)
    got, want = both(quantized_attention, *args, **options)
    near(got, want, slack(args, options, kind).double())


def sequences(rng: random.Random, device: str) -> None:
    """Sentences one after another: some without a token, some that end before the longest."""
    operand, kind = operand_and_kind(rng)
    T = rng.choice([1, 17, 64, 65, rng.randint(1, cases.LONGEST)])
    H, D, causal = rng.choice([1, 2, 3]), rng.choice(cases.HEADS), rng.random() < 0.4
    spans = [
        (first, rng.randint(first, T)) for first in rng.choices(range(T + 1), k=rng.randint(1, 4))
    ]
    spans.append((0, rng.randint(1, T)))
    (args, padded), (packed, options), rows = sentences(
        spans, T, H, D, operand, causal, device, rng.choice(cases.DOTS)
    )
    kind = {**kind, **step_of(kind["softmax"], H, device)}
    got, want = both(quantized_attention, *packed, **options, **kind)
    bound = slack(args, {**padded, **kind}, kind).flatten(0, 1)[rows]
    near(got[0], want[0], bound.double())


def takes_fp8(kind: dict[str, Any]) -> bool:
    """Whether v may be float8 beside such a softmax."""
    return kind["softmax"] == "code" or (kind["softmax"] == "log2" and kind["bits"] == 4)
