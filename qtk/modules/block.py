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

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import output_capturing

from qtk.hadamard import rotate
from qtk.models import Block
from qtk.modules.attention import attention
from qtk.modules.cpu_block import Forward, cpu_forward, runs_here
from qtk.modules.linear import QuantLinear
from qtk.modules.parts import Norm, Parts, make_parts
from qtk.modules.plan import multiply
from qtk_kernels.activation import activate
from qtk_kernels.layer_norm_quantize import layer_norm_quantize
from qtk_kernels.shift_scale_quantize import shift_scale_quantize

# change no number here; hidden states are seen between blocks
IGNORED = (
    "position_ids",
    "cache_position",
    "use_cache",
    "return_dict",
    "output_hidden_states",
)
CACHE = ("cache", "past_key_values")  # what transformers calls it from 5.24 on, and before


class FusedBlock(nn.Module):
    """Mixed into a transformers block by `fuse`; see the module's docstring."""

    block: Block
    _parts: Parts | None
    _on_cpu: Forward | None  # the forward of cpu_block.py, where it serves

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        if self._parts is None:
            self.prepare()
        if self._parts is None or _asks_for_more(self, hidden_states, attention_mask, args, kwargs):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)  # type: ignore
        return self.fused(hidden_states, attention_mask, _cache_of(kwargs))

    def fused(self, x: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
        """The fused forward, [B, T, H] -> [B, T, H]."""
        if self._on_cpu is not None and x.dtype == torch.float32:
            return self._on_cpu(x, mask, cache)
        assert self._parts is not None
        return fused_forward(self._parts, self.block, x, mask, cache)

    def prepare(self) -> None:
        """Builds the fused parts, or leaves None where the block cannot be fused."""
        self._parts = parts = make_parts(self, self.block)
        self._on_cpu = cpu_forward(parts, self.block) if parts and runs_here(parts) else None

    @property
    def is_fused(self) -> bool:
        return self._parts is not None

    def _apply(self, fn: Any, recurse: bool = True) -> "FusedBlock":
        fused, self._parts, self._on_cpu = self.is_fused, None, None
        super()._apply(fn, recurse)
        if fused:  # now, not at the next call, which torch.compile may trace
            self.prepare()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._parts = self._on_cpu = None  # the norms and linears inside are about to change
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_parts": None, "_on_cpu": None}

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
        module.block, module._parts, module._on_cpu = block, None, None  # type: ignore
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
    qkv = multiply(codes, scale, parts.qkv, x.dtype)
    context = attention(qkv, block, mask, cache, parts.products)
    y = out.multiply(*out.quantize(context), out_dtype=x.dtype)

    norm, emit = (parts.norm2, "sum") if block.pre_norm else (parts.norm1, "norm")
    codes, scale, x = _norm_quantize(y, x, norm, fc1, emit)
    h = fc1.multiply(codes, scale, out_dtype=x.dtype)
    y = fc2.multiply(*_activation_quantize(h, block.activation or "", fc2), out_dtype=x.dtype)
    if block.pre_norm:
        return x + y
    norm = parts.norm2
    return F.layer_norm(x + y, x.shape[-1:], norm.weight, norm.bias, norm.eps)


def _norm_quantize(
    x: Tensor, residual: Tensor | None, norm: Norm, reader: QuantLinear, emit: str | None
) -> tuple[Tensor, Tensor | None, Any]:
    plan = reader.plan
    assert plan.codes is not None
    emits_norm = emit == "norm"
    if reader.rotation:
        return _norm_rotate_quantize(x, residual, norm, reader, emit)
    return layer_norm_quantize(
        x, norm.q_weight, norm.q_bias, norm.eps, plan.codes, residual=residual, emit=emit,
        norm_weight=norm.weight if emits_norm else None,
        norm_bias=norm.bias if emits_norm else None,
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


def _activation_quantize(
    h: Tensor, activation: str, reader: QuantLinear
) -> tuple[Tensor, Tensor | None]:
    plan = reader.plan
    assert plan.codes is not None
    if reader.rotation:
        return reader.quantize(activate(h, activation))
    return shift_scale_quantize(
        h, plan.multiplier, plan.offset, plan.codes, activation=activation, backend=plan.backend
    )


def _cache_of(kwargs: dict[str, Any]) -> Any:
    return next((kwargs[name] for name in CACHE if kwargs.get(name) is not None), None)


def _asks_for_more(
    module: nn.Module, x: Tensor, mask: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool:
    """Whether the call wants something that only the unfused forward gives."""
    block: Block = module.block  # type: ignore[assignment]
    if module.training or (torch.is_grad_enabled() and x.requires_grad):
        return True
    if mask is not None and mask.dim() != 4:
        return True
    cache = _cache_of(kwargs)
    if cache is not None and not (block.causal and hasattr(cache, "layers")):
        return True  # a cache of another kind: cross attention, static, a user's own
    known = (*IGNORED, *CACHE)
    rest = [*args, *(v for k, v in kwargs.items() if k not in known)]
    if any(value is not None and value is not False for value in rest):
        return True
    if torch.compiler.is_compiling():
        return False  # a hook breaks fullgraph anyway
    return any(module._parts.hooks) and _somebody_listens(module._parts.hooks)  # type: ignore


def _somebody_listens(hooks: list[dict[int, Any]]) -> bool:
    """Whether a hook inside the block wants what passes there.

    After a call that asked for hidden states or attention maps, transformers leaves its recorders
    where they were. Of later calls they record what those ask for, mostly nothing.
    """
    called = [hook for found in hooks for hook in found.values()]
    if any(getattr(hook, "__module__", None) != output_capturing.__name__ for hook in called):
        return True
    return bool(set(output_capturing._active_collector.get() or ()) - {"hidden_states"})
