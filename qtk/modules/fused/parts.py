"""What a fused block is made of, worked out once: norms folded into quantizers, products joined."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qtk.models import Anatomy
from qtk.modules.attention import CHILD, QuantAttention
from qtk.modules.linear import QuantLinear
from qtk.modules.products import Operands, Product, product_of
from qtk.modules.reader import Read, Reader


@dataclass(frozen=True)
class Norm:
    """A LayerNorm and the quantizer after it.

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
    """Readers and products of one block, in the order of computation.

    Attributes:
        norm1, norm2: each folded into the reader after it.
        attention: quantized attention products, None for floating point.
        hooks: of the modules inside, empty unless somebody looks in.
    """

    anatomy: Anatomy
    read_x: Reader
    qkv: Product
    read_context: Reader
    out: Product
    read_norm: Reader
    up: Product
    read_hidden: Reader
    down: Product
    norm1: Norm
    norm2: Norm
    attention: QuantAttention | None
    hooks: list[dict[int, Any]]

    @property
    def products(self) -> tuple[Product, ...]:
        return self.qkv, self.out, self.up, self.down


@dataclass(frozen=True)
class Seams:
    """Where floats become codes, and the residual stream's additions and norms.

    Attributes:
        enter: x -> what q, k and v read.
        read_context: attention's output -> what the projection reads.
        norm_read: (projection, x) -> what the MLP reads, and the residual stream.
        up_read: what the MLP reads, and the type of x -> what its second linear reads.
        leave: (MLP, residual stream) -> the block's output.
    """

    enter: Callable[[Tensor], Read]
    read_context: Callable[[Tensor], Read]
    norm_read: Callable[[Tensor, Tensor], tuple[Read, Tensor]]
    up_read: Callable[[Read, torch.dtype], Read]
    leave: Callable[[Tensor, Tensor], Tensor]


def make_parts(module: nn.Module, anatomy: Anatomy) -> Parts | None:
    """The parts of a block whose linears are quantized; None where it cannot be fused."""
    found = [module.get_submodule(name) for name in anatomy.linears]
    linears = [m for m in found if isinstance(m, QuantLinear) and m.scheme.a is not None]
    if anatomy.mlp.activation is None or len(linears) < len(found):
        return None
    if any(linear.weight_scale.is_meta for linear in linears) or not _unscaled(module, anatomy):
        return None
    q, k, v, out, *up, down = linears
    if not (_read_alike([q, k, v]) and _read_alike(up)):
        return None
    before, after = (q, up[0]) if anatomy.pre_norm else (up[0], up[0])
    norm1 = _norm(module.get_submodule(anatomy.norm1), before.reader)
    norm2 = _norm(module.get_submodule(anatomy.norm2), after.reader)
    parent = module.get_submodule(anatomy.attention.module)
    inner = [m for m in module.modules() if m is not module]
    hooks: list[Any] = [h for m in inner for h in (m._forward_hooks, m._forward_pre_hooks)]
    return Parts(
        anatomy, q.reader, _joined([q, k, v]), out.reader, out.product, up[0].reader,
        up[0].product if len(up) == 1 else _joined(up), down.reader, down.product,
        norm1, norm2, getattr(parent, CHILD, None), hooks,
    )  # fmt: skip


def _unscaled(module: nn.Module, anatomy: Anatomy) -> bool:
    """Whether LayerScale, if any, was folded into the linears."""
    names = anatomy.scales or ()
    return all(bool((module.get_parameter(name) == 1).all()) for name in names)


def _read_alike(linears: list[QuantLinear]) -> bool:
    """Whether one quantized tensor serves all of them."""
    first = linears[0]
    return all(
        first.scheme == other.scheme and first.reader.same_as(other.reader) for other in linears[1:]
    )


def _joined(linears: list[QuantLinear]) -> Product:
    """One product with all their output channels; each gives up its own."""
    operands = Operands.joined([linear.operands() for linear in linears])
    product = product_of(operands, linears[0].reader.backend)
    start = 0
    for linear in linears:
        linear.share(product, slice(start, start := start + linear.out_features))
    return product


def _norm(norm: nn.Module, reader: Reader) -> Norm:
    assert isinstance(norm, nn.LayerNorm)
    K, like = norm.normalized_shape[0], norm.weight
    if like is None:
        device = "cpu" if reader.folded is None else reader.folded[0].device
        like = torch.ones(K, device=device)
    gamma = like.detach().float()
    beta = torch.zeros_like(gamma) if norm.bias is None else norm.bias.detach().float()
    q_weight, q_bias = gamma, beta
    if reader.folded is not None:
        multiplier, offset = reader.folded
        q_weight, q_bias = gamma * multiplier, beta * multiplier + offset
    return Norm(gamma.to(like.dtype), beta.to(like.dtype), norm.eps, q_weight, q_bias)
