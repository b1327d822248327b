"""Calls with a cache of keys and values: a prompt at once, then one token at a time.

prefill    tokens                        -> logits, keys and values of every layer
step       one token, keys and values    -> logits, keys and values with it
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from qtk.packages.route import Route

PREFILL, STEP = "prefill", "step"
NAMES = ("cache", "past_key_values")  # of the argument, from transformers 5.24 on and before


@dataclass
class Cached:
    """A call that a package serves, and the cache that it fills.

    Attributes:
        inputs: by name, those of the cache flattened.
        name: of the cache among the outputs.
    """

    route: Route
    inputs: dict[str, Any]
    cache: DynamicCache
    name: str

    def finish(self, outputs: dict[str, Tensor]) -> dict[str, Any]:
        """Puts keys and values where they belong."""
        found: dict[str, Any] = dict(outputs)
        is_step = "key_0" in self.route.signature.inputs
        for i in range(sum(name.startswith("key_") for name in outputs)):
            key, value = found.pop(f"key_{i}"), found.pop(f"value_{i}")
            if is_step:
                layer: Any = self.cache.layers[i]
                layer.keys, layer.values = key, value
            else:
                self.cache.update(key, value, i)
        return {**found, self.name: self.cache}


def cached_call(model: Any, routes: Mapping[str, Route], given: Mapping[str, Any]) -> Cached | None:
    """What serves a call that wants a cache; None where no package does."""
    rest = dict(given)
    caches = [found for name in NAMES if (found := rest.pop(name, None)) is not None]
    cache = caches[0] if caches else DynamicCache(config=model.config)
    ids = rest.get("input_ids")
    plain = type(cache) is DynamicCache and all(type(x) is DynamicLayer for x in cache.layers)
    if not plain or not isinstance(ids, Tensor) or ids.dim() != 2:
        return None
    past = int(cache.get_seq_length())
    kind = PREFILL if past == 0 else STEP
    if kind not in routes or (past and ids.shape[1] != 1):
        return None
    mask = rest.setdefault("attention_mask", ids.new_ones(len(ids), past + ids.shape[1]))
    if not isinstance(mask, Tensor) or mask.shape != (len(ids), past + ids.shape[1]):
        return None
    if "position_ids" not in rest:
        rest["position_ids"] = (mask.long().cumsum(1) * mask - 1)[:, past:].long()
    if kind == STEP:
        for i, layer in enumerate(cache.layers):
            rest |= {f"key_{i}": layer.keys, f"value_{i}": layer.values}
    name = NAMES[0] if NAMES[0] in fields_of_output(routes[kind]) else NAMES[1]
    return Cached(routes[kind], rest, cache, name)


def fields_of_output(route: Route) -> tuple[str, ...]:
    """The names that a class of outputs has for a cache."""
    import transformers

    found: Any = getattr(transformers.modeling_outputs, route.signature.returns, None)
    return tuple(getattr(found, "__dataclass_fields__", ()))


class CachedForward(torch.nn.Module):
    """What is traced for such packages: tensors in, tensors out, in the signature's order.

    Args:
        layers: that the model has.
    """

    def __init__(self, model: Any, inputs: tuple[str, ...], layers: int) -> None:
        super().__init__()
        self.model, self.inputs, self.layers = model, inputs, layers
        known = inspect.signature(model.forward).parameters
        self.name = next(name for name in NAMES if name in known)

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        given: dict[str, Any] = dict(zip(self.inputs, args, strict=True))
        cache = DynamicCache(config=self.model.config)
        if "key_0" in given:
            for i in range(self.layers):
                cache.update(given.pop(f"key_{i}"), given.pop(f"value_{i}"), i)
        given[self.name] = cache
        out = self.model(**given, use_cache=True, return_dict=True)
        held: list[Any] = list(cache.layers)
        return (out[0], *(x for layer in held for x in (layer.keys, layer.values)))
