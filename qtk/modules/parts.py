"""What a fused block reads, worked out once: norms folded into quantizers, q, k and v joined."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qtk.models import Block
from qtk.modules.attention import CHILD, QuantAttention
from qtk.modules.linear import QuantLinear
from qtk.modules.plan import Plan, prepare_operand


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
    hooks: list[dict[int, Any]]  # of the modules inside, empty unless somebody looks in


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
    inner = [m for m in module.modules() if m is not module]
    hooks: list[Any] = [h for m in inner for h in (m._forward_hooks, m._forward_pre_hooks)]
    products = getattr(parent, CHILD, None)
    return Parts(_join(q, k, v), (q, out, fc1, fc2), norm1, norm2, products, hooks)


def _same_input(q: QuantLinear, k: QuantLinear, v: QuantLinear) -> bool:
    """Whether one quantized tensor serves all three."""

    def equal(a: Tensor | None, b: Tensor | None) -> bool:
        return a is b or (a is not None and b is not None and torch.equal(a, b))

    return all(
        q.scheme == other.scheme
        and q.rotation == other.rotation
        and equal(q.plan.before and q.plan.before[0], other.plan.before and other.plan.before[0])
        and equal(q.plan.before and q.plan.before[1], other.plan.before and other.plan.before[1])
        and q.plan.codes == other.plan.codes
        and equal(q.plan.multiplier, other.plan.multiplier)
        and equal(q.plan.offset, other.plan.offset)
        for other in (k, v)
    )


def _join(q: QuantLinear, k: QuantLinear, v: QuantLinear) -> Plan:
    """One plan whose output is [q, k, v], 3 * H wide; the three give up their own operands."""
    linears, plan = (q, k, v), q.plan
    codes = torch.cat([linear.codes() for linear in linears])
    operand, _ = prepare_operand(codes, q.w, q.weight_scale.shape[1], plan.backend)
    start = 0
    for linear in linears:
        linear.join(operand, slice(start, start := start + linear.out_features))
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
