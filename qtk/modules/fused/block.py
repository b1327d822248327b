"""When a block of a model runs fused, and in which order.

The module keeps the class, the children and the names of the block that it replaces. When a caller
asks for what the fused path cannot give (attention maps, hooks inside the block, gradients,
training), the original forward runs on the same quantized linears.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import output_capturing

from qtk.models import Block
from qtk.modules.attention import attend, attend_sequences, reads_sequences
from qtk.modules.fused import kernels, onednn
from qtk.modules.fused.packing import packing_of
from qtk.modules.fused.parts import Parts, Seams, make_parts
from qtk.modules.linear import QuantLinear

# change no number here; hidden states are seen between blocks
IGNORED = (
    "position_ids",
    "cache_position",
    "use_cache",
    "return_dict",
    "output_hidden_states",
    "is_causal",
    "resolution",
    "interpolate_pos_encoding",
)
CACHE = ("cache", "past_key_values")  # what transformers calls it from 5.24 on, and before

Forward = Callable[[Tensor, Tensor | None, Any], Tensor]
Prepared = tuple[Parts | None, dict[torch.dtype | None, Forward]]


def dataflow(parts: Parts, seams: Seams, layer: int) -> Forward:
    """The block's forward: [B, T, H] -> [B, T, H], in x's dtype; a mask and a cache may be None."""
    qkv, out, down = parts.qkv, parts.out, parts.down
    attention, products = parts.anatomy.attention, parts.attention
    backend = parts.read_x.backend

    def forward(x: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
        dtype = x.dtype
        in_sequences = cache is None and reads_sequences(backend, products, dtype)
        packing = packing_of(x, mask, in_sequences)
        x = packing.pack(x)
        heads = qkv(*seams.enter(x), dtype)
        if packing.sequences is not None:
            context = attend_sequences(
                heads, attention, packing.sequences, packing.tokens, packing.causal, products
            )
        else:
            heads = packing.unpack(heads)
            context = packing.pack(attend(heads, attention, layer, mask, cache, products))
        codes, x = seams.norm_read(out(*seams.read_context(context), dtype), x)
        return packing.unpack(seams.leave(down(*seams.up_read(codes, dtype), dtype), x))

    return forward


class FusedBlock(nn.Module):
    """Mixed into a transformers block by `fuse`; see the module's docstring."""

    block: Block
    first: bool  # of the model's blocks
    _parts: Parts | None
    _forwards: dict[torch.dtype | None, Forward]  # None: for types without one of their own

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        if self._parts is None:
            self.prepare()
        if self._parts is None or _asks_for_more(self, hidden_states, attention_mask, args, kwargs):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)  # type: ignore
        return self.fused(hidden_states, attention_mask, _cache_of(kwargs))

    def fused(self, x: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
        """The fused forward, [B, T, H] -> [B, T, H].

        A sample that comes with nan or infinity leaves with nan: codes would hide it.
        """
        poison = x.flatten(1).sum(1, dtype=torch.float32) * 0 if self.first else None
        y = self.forward_for(x.dtype)(x, mask, cache)
        return y if poison is None else y + poison.to(y.dtype)[:, None, None]

    def forward_for(self, dtype: torch.dtype) -> Forward:
        """The dataflow with the seams that serve this type."""
        return self._forwards.get(dtype) or self._forwards[None]

    def prepare(self) -> None:
        """Builds the fused parts, or leaves None where the block cannot be fused."""
        self._parts, self._forwards = None, {}
        if self.block.anatomy is None:
            return
        self._parts = parts = make_parts(self, self.block.anatomy)
        if parts is None:
            return
        flow = partial(dataflow, parts, layer=int(self.block.name.rpartition(".")[2]))
        self._forwards = {None: flow(kernels.seams(parts))}
        if onednn.runs_here(parts):
            self._forwards[torch.float32] = flow(onednn.seams(parts))

    def snapshot(self) -> Prepared:
        """The parts, for `restore`; its linears have snapshots of their own."""
        return self._parts, self._forwards

    def restore(self, found: Prepared) -> None:
        self._parts, self._forwards = found

    def unprepare(self) -> None:
        """Forgets the parts: the norms and linears inside are about to change."""
        self._parts, self._forwards = None, {}

    def tensors(self) -> list[Tensor]:
        """What its linears hold, each on its own and together."""
        found = [t for m in self.modules() if isinstance(m, QuantLinear) for t in m.tensors()]
        products = () if self._parts is None else self._parts.products
        return found + [t for product in products for t in product.tensors()]

    @property
    def is_fused(self) -> bool:
        return self._parts is not None

    def _apply(self, fn: Any, recurse: bool = True) -> "FusedBlock":
        fused = self.is_fused
        self.unprepare()
        super()._apply(fn, recurse)
        if fused:  # now, not at the next call, which torch.compile may trace
            self.prepare()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unprepare()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_parts": None, "_forwards": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.prepare()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (type(self).__mro__[2],), self.__getstate__()


@cache
def fused_class(base: Any) -> Any:
    """A subclass of a transformers block class with the fused forward, under the same name."""
    return type(base.__name__, (FusedBlock, base), {"__module__": base.__module__})


def fuse(model: nn.Module, blocks: Sequence[Block], only: Sequence[Block] | None = None) -> None:
    """Gives every block of the model that has an anatomy its fused forward, in place.

    Args:
        only: of the blocks, those that are in memory; all if None.
    """
    for i, block in enumerate(blocks):
        if block.anatomy is None or (only is not None and block not in only):
            continue
        module: Any = model.get_submodule(block.name)
        if not isinstance(module, FusedBlock):
            base: Any = type(module)
            module.__class__ = fused_class(base)
            module.register_load_state_dict_post_hook(_prepare_again)
        module.block, module.first = block, i == 0
        module.prepare()


def unfuse(model: nn.Module) -> None:
    """Gives every fused block its own class back, in place."""
    for module in model.modules():
        if isinstance(module, FusedBlock):
            base: Any = type(module).__mro__[2]
            for name in ("block", "first", "_parts", "_forwards"):
                module.__dict__.pop(name, None)
            module._load_state_dict_post_hooks.clear()
            module.__class__ = base


def _prepare_again(module: Any, _: Any) -> None:
    module.prepare()


def _rebuild(base: Any) -> nn.Module:
    cls = fused_class(base)
    return cls.__new__(cls)


def _cache_of(kwargs: dict[str, Any]) -> Any:
    return next((kwargs[name] for name in CACHE if kwargs.get(name) is not None), None)


def _asks_for_more(
    module: FusedBlock, x: Tensor, mask: Tensor | None, args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> bool:  # fmt: skip
    """Whether the call wants something that only the unfused forward gives."""
    if module.training or (torch.is_grad_enabled() and x.requires_grad):
        return True
    if mask is not None and mask.dim() != 4:
        return True
    cache = _cache_of(kwargs)
    if cache is not None and not (module.block.causal and hasattr(cache, "layers")):
        return True  # a cache of another kind: cross attention, static, a user's own
    known = (*IGNORED, *CACHE)
    if bool(kwargs.get("is_causal")) and not module.block.causal:
        return True
    rest = [*args, *(v for k, v in kwargs.items() if k not in known)]
    if any(value is not None and value is not False for value in rest):
        return True
    if torch.compiler.is_compiling():
        return False  # a hook breaks fullgraph anyway
    assert module._parts is not None
    return any(module._parts.hooks) and somebody_listens(module._parts.hooks)


def somebody_listens(hooks: Sequence[Mapping[int, Any]]) -> bool:
    """Whether a hook inside a block or model wants what passes there.

    After a call that asked for hidden states or attention maps, transformers leaves its recorders
    where they were. Of later calls they record what those ask for, mostly nothing.
    """
    called = [hook for found in hooks for hook in found.values()]
    if any(getattr(hook, "__module__", None) != output_capturing.__name__ for hook in called):
        return True
    return bool(set(output_capturing._active_collector.get() or ()) - {"hidden_states"})
