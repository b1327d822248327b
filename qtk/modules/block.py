"""One transformer block on integers, fused: serves BERT, OPT and ViT alike.

    pre-norm                                    post-norm
    codes      = quantize(norm1(x))             codes      = quantize(x)
    context    = attention(codes @ qkv)         context    = attention(codes @ qkv)
    y          = quantize(context) @ out        y          = quantize(context) @ out
    x          = x + y                          x          = norm1(x + y)
    codes      = quantize(norm2(x))             codes      = quantize(x)
    h          = codes @ fc1                    h          = codes @ fc1
    y          = quantize(act(h)) @ fc2         y          = quantize(act(h)) @ fc2
    return x + y                                return norm2(x + y)

A residual addition, the LayerNorm that follows it and the quantizer behind that are one kernel, an
activation and its quantizer another, and q, k and v are one matrix product. The module keeps the
class, the children and the names of the block that it replaces. When a caller asks for what the
fused path cannot give (attention maps, hooks inside the block, gradients, training), the
original forward runs on the same quantized linears.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qtk.hadamard import rotate
from qtk.models import Block
from qtk.modules.attention import CHILD, QuantAttention
from qtk.modules.linear import Plan, QuantLinear, linear_of_codes, prepare_operand
from qtk_kernels._activation import activate
from qtk_kernels.gelu_quantize import activation_quantize
from qtk_kernels.layer_norm_quantize import layer_norm_quantize

CACHED_ROWS = 512  # of an MLP's inner activation: 3 to 6 MB of float32 at usual widths
IGNORED = ("position_ids", "cache_position", "use_cache", "return_dict")  # change no number here


@dataclass(frozen=True)
class Norm:
    """A LayerNorm and the quantizer behind it.

    Attributes:
        weight, bias: [H], the float norm.
        q_weight, q_bias: [H] with the quantizer's multiplier and offset folded in.
    """

    weight: Tensor
    bias: Tensor
    eps: float
    q_weight: Tensor
    q_bias: Tensor


@dataclass(frozen=True)
class Parts:
    """What the fused forward reads, worked out once."""

    qkv: Plan
    linears: tuple[
        QuantLinear, QuantLinear, QuantLinear, QuantLinear
    ]  # q (for q, k, v), out, fc1, fc2
    norm1: Norm
    norm2: Norm
    products: QuantAttention | None


class FusedBlock(nn.Module):
    """Mixed into a transformers block by `fuse`; see the module's docstring."""

    block: Block
    _parts: Parts | None

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        if self._parts is None:
            self.prepare()
        if self._parts is None or _asks_for_more(self, hidden_states, attention_mask, args, kwargs):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)  # type: ignore
        cache = kwargs.get("past_key_values")
        return fused_forward(self._parts, self.block, hidden_states, attention_mask, cache)

    def prepare(self) -> None:
        """Builds the fused parts, or leaves None where the block cannot be fused."""
        self._parts = make_parts(self, self.block)

    @property
    def is_fused(self) -> bool:
        return self._parts is not None

    def _apply(self, fn: Any, recurse: bool = True) -> "FusedBlock":
        fused, self._parts = self.is_fused, None
        super()._apply(fn, recurse)
        if fused:  # now, not at the next call, which torch.compile may trace
            self.prepare()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._parts = None  # the norms and linears inside are about to change
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_parts": None}

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (type(self).__mro__[2],), self.__getstate__()


@cache
def fused_class(base: Any) -> Any:
    """A subclass of a transformers block class with the fused forward, under the same name."""
    return type(base.__name__, (FusedBlock, base), {"__module__": base.__module__})


def fuse(model: nn.Module, blocks: tuple[Block, ...]) -> None:
    """Gives every block of the model its fused forward, in place."""
    for block in blocks:
        module = model.get_submodule(block.name)
        if not isinstance(module, FusedBlock):
            base: Any = type(module)
            module.__class__ = fused_class(base)
        module.block, module._parts = block, None  # type: ignore[assignment]
        module.prepare()  # type: ignore[operator]


def _rebuild(base: Any) -> nn.Module:
    cls = fused_class(base)
    return cls.__new__(cls)


def fused_forward(
    parts: Parts, block: Block, x: Tensor, mask: Tensor | None, cache: Any = None
) -> Tensor:
    """[B, T, H] -> [B, T, H], in x's dtype; keys and values pass through the cache, if any."""
    q, out, fc1, fc2 = parts.linears
    if block.pre_norm:
        codes, scale, _ = _norm_quantize(x, None, parts.norm1, q, emit=None)
    else:
        codes, scale = q.quantize(x)
    qkv = linear_of_codes(
        codes, scale, parts.qkv, q.is_int4, q.in_features, q.w.group_size, x.dtype
    )
    context = attention(qkv, block, mask, cache, parts.products)
    y = out.multiply(*out.quantize(context), out_dtype=x.dtype)

    if block.pre_norm:
        codes, scale, x = _norm_quantize(y, x, parts.norm2, fc1, emit="sum")
    else:
        codes, scale, x = _norm_quantize(y, x, parts.norm1, fc1, emit="norm")
    y = mlp(codes, scale, fc1, fc2, block.activation or "", x.dtype)

    if block.pre_norm:
        return x + y
    norm = parts.norm2
    return F.layer_norm(x + y, x.shape[-1:], norm.weight, norm.bias, norm.eps)


def attention(
    qkv: Tensor, block: Block, mask: Tensor | None, cache: Any = None,
    products: QuantAttention | None = None,
) -> Tensor:  # fmt: skip
    """softmax(q k^T / sqrt(D)) v, quantized or in floating point: [B, T, 3 * H] -> [B, T, H]."""
    B, T, width = qkv.shape
    D = width // (3 * block.heads)
    q, k, v = qkv.view(B, T, 3, block.heads, D).permute(2, 0, 3, 1, 4)  # each [B, heads, T, D]
    if cache is not None:
        k, v = cache.update(k, v, int(block.name.rpartition(".")[2]))
    causal = block.causal and mask is None and T > 1
    if products is not None:
        return products(q, k, v, mask=mask, causal=causal)
    if mask is not None and mask.dtype == torch.bool and not mask.is_cuda:
        # added, not selected: a CPU's attention takes 5.6 ms instead of 9 for 16x12x128x32
        blocked = torch.finfo(q.dtype).min
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, blocked)
    context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return context.transpose(1, 2).reshape(B, T, block.heads * D)


def _norm_quantize(
    x: Tensor, residual: Tensor | None, norm: Norm, reader: QuantLinear, emit: str | None
) -> tuple[Tensor, Tensor | None, Any]:
    plan, a = reader.plan, reader.scheme.a
    assert a is not None
    emits_norm = emit == "norm"
    if reader.rotation:
        return _norm_rotate_quantize(x, residual, norm, reader, emit)
    return layer_norm_quantize(
        x, norm.q_weight, norm.q_bias, norm.eps, residual=residual, emit=emit,
        norm_weight=norm.weight if emits_norm else None,
        norm_bias=norm.bias if emits_norm else None,
        bits=a.bits, granularity=a.granularity, signed=plan.signed, clip=plan.clip,
        backend=plan.backend,
    )  # fmt: skip


def _norm_rotate_quantize(
    x: Tensor, residual: Tensor | None, norm: Norm, reader: QuantLinear, emit: str | None
) -> tuple[Tensor, Tensor | None, Any]:
    """A rotation needs the whole norm before it: not one kernel but three."""
    h = x if residual is None else x + residual
    y = F.layer_norm(h.float(), h.shape[-1:], norm.q_weight, norm.q_bias, norm.eps)
    emitted = h
    if emit == "norm":
        emitted = F.layer_norm(h, h.shape[-1:], norm.weight, norm.bias, norm.eps)
    return *reader.quantize_rotated(rotate(y)), emitted


def mlp(
    codes: Tensor, scale: Tensor | None, fc1: QuantLinear, fc2: QuantLinear, activation: str,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """fc2(activation(fc1(x))) from the codes of x: [..., H] -> [..., H].

    On a CPU some rows at a time, so that what lies between the two products stays in the cache
    (2048x384x1536 on 2 cores: 8.6 ms where all rows at once take 14).
    """
    rows = codes.shape[:-1].numel()
    if fc1.plan.backend != "cpu" or rows <= CACHED_ROWS or torch.compiler.is_compiling():
        h = fc1.multiply(codes, scale, out_dtype=dtype)
        return fc2.multiply(*_activation_quantize(h, activation, fc2), out_dtype=dtype)
    flat = codes.reshape(rows, -1)
    y = torch.empty(rows, fc2.out_features, dtype=dtype)
    for start in range(0, rows, CACHED_ROWS):
        part = slice(start, start + CACHED_ROWS)
        part_scale = None if scale is None else scale.reshape(rows, -1)[part]
        y[part] = mlp(flat[part], part_scale, fc1, fc2, activation, dtype)
    return y.view(*codes.shape[:-1], -1)


def _activation_quantize(
    h: Tensor, activation: str, reader: QuantLinear
) -> tuple[Tensor, Tensor | None]:
    plan, a = reader.plan, reader.scheme.a
    assert a is not None
    if reader.rotation:
        return reader.quantize(activate(h, activation))
    return activation_quantize(
        h, plan.multiplier, plan.offset, activation=activation, bits=a.bits,
        granularity=a.granularity, signed=plan.signed, clip=plan.clip, backend=plan.backend,
    )  # fmt: skip


def _asks_for_more(
    module: nn.Module, x: Tensor, mask: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool:
    """Whether the call wants something that only the unfused forward gives."""
    block: Block = module.block  # type: ignore[assignment]
    if module.training or (torch.is_grad_enabled() and x.requires_grad):
        return True
    if mask is not None and mask.dim() != 4:
        return True
    cache = kwargs.get("past_key_values")
    if cache is not None and not (block.causal and hasattr(cache, "layers")):
        return True  # a cache of another kind: cross attention, static, a user's own
    known = (*IGNORED, "past_key_values")
    rest = [*args, *(v for k, v in kwargs.items() if k not in known)]
    if any(value is not None and value is not False for value in rest):
        return True
    if torch.compiler.is_compiling():
        return False  # a hook breaks fullgraph anyway
    inner = (m for m in module.modules() if m is not module)
    return any(m._forward_hooks or m._forward_pre_hooks for m in inner)


def make_parts(module: nn.Module, block: Block) -> Parts | None:
    """Folds norms into quantizers and joins q, k and v; None where that cannot be done."""
    names = (block.q, block.k, block.v, block.out, block.fc1, block.fc2)
    modules = [module.get_submodule(name) for name in names]
    linears = [m for m in modules if isinstance(m, QuantLinear) and m.scheme.a is not None]
    if block.activation is None or len(linears) < len(names):
        return None
    q, k, v, out, fc1, fc2 = linears
    if any(linear.weight_scale.is_meta for linear in linears) or not _same_input(q, k, v):
        return None
    norm1 = _norm(module.get_submodule(block.norm1), q if block.pre_norm else fc1)
    norm2 = _norm(module.get_submodule(block.norm2), fc1)
    parent = module.get_submodule(block.q.rpartition(".")[0])
    return Parts(_join(q, k, v), (q, out, fc1, fc2), norm1, norm2, getattr(parent, CHILD, None))


def _same_input(q: QuantLinear, k: QuantLinear, v: QuantLinear) -> bool:
    """Whether one quantized tensor serves all three."""

    def equal(a: Tensor | None, b: Tensor | None) -> bool:
        return a is b or (a is not None and b is not None and torch.equal(a, b))

    return all(
        q.scheme == other.scheme
        and q.rotation == other.rotation
        and equal(q.plan.before and q.plan.before[0], other.plan.before and other.plan.before[0])
        and equal(q.plan.before and q.plan.before[1], other.plan.before and other.plan.before[1])
        and q.plan.clip == other.plan.clip
        and equal(q.plan.multiplier, other.plan.multiplier)
        and equal(q.plan.offset, other.plan.offset)
        for other in (k, v)
    )


def _join(q: QuantLinear, k: QuantLinear, v: QuantLinear) -> Plan:
    """One plan whose output is [q, k, v], 3 * H wide."""
    linears, plan = (q, k, v), q.plan
    codes = torch.cat([linear.codes() for linear in linears])
    operand, _ = prepare_operand(codes, q.is_int4, q.weight_scale.shape[1], plan.backend)
    biases = [
        linear.plan.weight_scale.new_zeros(linear.out_features)
        if linear.plan.bias is None
        else linear.plan.bias
        for linear in linears
    ]
    weight_scale = torch.cat([linear.plan.weight_scale for linear in linears])
    return replace(plan, operand=operand, weight_scale=weight_scale, bias=torch.cat(biases))


def _norm(norm: nn.Module, reader: QuantLinear) -> Norm:
    assert isinstance(norm, nn.LayerNorm)
    K, device = norm.normalized_shape[0], reader.weight_scale.device
    gamma = torch.ones(K, device=device) if norm.weight is None else norm.weight.detach().float()
    beta = torch.zeros(K, device=device) if norm.bias is None else norm.bias.detach().float()
    plan = reader.plan
    multiplier, offset = plan.multiplier, plan.offset
    if reader.rotation:
        multiplier, offset = plan.before or (None, None)
    q_weight, q_bias = gamma, beta
    if multiplier is not None and offset is not None:
        q_weight, q_bias = gamma * multiplier, beta * multiplier + offset
    dtype = gamma.dtype if norm.weight is None else norm.weight.dtype
    return Norm(gamma.to(dtype), beta.to(dtype), norm.eps, q_weight, q_bias)
