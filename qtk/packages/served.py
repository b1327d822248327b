"""A quantized model whose calls are served by packages where one fits.

It keeps its class, names and weights. What packages cannot give (gradients, attention maps, hooks,
losses, inputs that they were not made for, other dtypes) its own forward gives, as before.
"""

import functools
import inspect
import logging
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from qtk.modules.fused.block import somebody_listens
from qtk.packages.bundle import Bundle
from qtk.packages.caching import Cached, cached_call
from qtk.packages.package import ROWS, TOKENS, Signature, Size, cut, fitted
from qtk.packages.route import PLAIN, Route

# what changes no number where it is None or False, or says only how the result is wrapped
HARMLESS = ("return_dict", "is_causal")
ASKS = ("output_hidden_states", "output_attentions")

logger = logging.getLogger("qtk")


class ServedModel(nn.Module):
    """Mixed into a model's class by `serve`; see the module's docstring."""

    qtk_packages: Bundle | None
    _device_dtype: tuple[torch.device, torch.dtype]
    _listened: list[Any]

    def _apply(self, fn: Any, recurse: bool = True) -> "ServedModel":
        super()._apply(fn, recurse)
        if self.qtk_packages is not None and _device_dtype(self) != self._device_dtype:
            logger.warning("the model was moved: its packages stay behind, and it runs eager")
            self.qtk_packages = None
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Other weights; the packages hold the old ones, and are dropped."""
        if self.qtk_packages is not None:
            logger.warning("the model gets other weights: its packages are dropped; compile again")
            self.qtk_packages = None
        return super().load_state_dict(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = {**self.__dict__, "_listened": []}
        return _rebuild, (type(self).__mro__[2],), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._listened = _hooks(self)


def serve(model: Any, bundle: Bundle) -> Any:
    """The same model by packages: an object of its own that shares the modules."""
    base = type(model).__mro__[2] if isinstance(model, ServedModel) else type(model)
    served: Any = served_class(base).__new__(served_class(base))
    own = {k: v.copy() if isinstance(v, dict) else v for k, v in model.__dict__.items()}
    served.__dict__.update(own)
    served.qtk_packages = bundle
    served._device_dtype, served._listened = _device_dtype(model), _hooks(model)
    return served


def bundle_of(model: object) -> Bundle | None:
    """The packages that serve a model, None where it has none."""
    found = getattr(model, "qtk_packages", None)
    return found if isinstance(found, Bundle) else None


@cache
def served_class(base: Any) -> Any:
    """A subclass of a model's class that looks for packages first, under the same name."""
    names = tuple(inspect.signature(base.forward).parameters)[1:]

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.qtk_packages is not None and not _needs_eager(self):
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            found = _served(self, self.qtk_packages, given)
            if found is not None:
                return found
        return base.forward(self, *args, **kwargs)

    return type(
        base.__name__, (ServedModel, base), {"__module__": base.__module__, "forward": forward}
    )


def _served(model: Any, bundle: Bundle, given: dict[str, Any]) -> Any:
    """The outputs, or None where the call is not one for packages."""
    given = {name: value for name, value in given.items() if value is not None}
    if any(given.pop(name, getattr(model.config, name, False)) for name in ASKS):
        return None
    wrapped = given.pop("return_dict", getattr(model.config, "return_dict", True))
    call: Cached | None = None
    route = bundle.routes[PLAIN]
    wants_cache = given.pop("use_cache", getattr(model.config, "use_cache", False))
    if wants_cache and route.signature.caches:
        call = cached_call(model, bundle.routes, given)
        if call is None:
            return None
        route, given = call.route, call.inputs
    keep = given.pop("logits_to_keep", 0) if "logits" in route.signature.outputs else 0
    inputs = _inputs(route.signature, given)
    if inputs is None or not isinstance(keep, int):
        return None
    outputs = _run(route, inputs)
    if outputs is None:
        return None
    named = dict(zip(route.signature.outputs, outputs, strict=True))
    if keep:
        named["logits"] = named["logits"][:, -keep:]
    if call is not None:
        named = call.finish(named)
    returned = output_class(route.signature.returns, type(model))(**named)
    return returned if wrapped else returned.to_tuple()


def _run(route: Route, inputs: list[Tensor]) -> list[Tensor] | None:
    size = size_of(route.signature, inputs)
    package = None if size is None else route.choose(size)
    if size is None or package is None:
        return None
    if package.size is None or package.size == size:
        return package(inputs)
    padded = fitted(inputs, route.signature, package.size, route.pad_id)
    return cut(package(padded), route.signature, size)


def _needs_eager(model: Any) -> bool:
    return (
        model.training
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
        or (any(model._listened) and somebody_listens(model._listened))
    )


def _inputs(signature: Signature, given: Mapping[str, Any]) -> list[Tensor] | None:
    """The tensors in order, with defaults for those left out; None where there are others."""
    rest = {name for name, value in given.items() if value is not False}
    if rest - set(signature.inputs) - set(HARMLESS):
        return None
    first, found = given.get(next(iter(signature.inputs))), []
    if "input_ids" in signature.inputs:
        first = given.get("input_ids")
    for name, axes in signature.inputs.items():
        x = given.get(name)
        if x is None:
            x = _default(name, first)
        if not isinstance(x, Tensor) or x.dim() != len(axes) or x.device.type != "cpu":
            return None
        if x.requires_grad and torch.is_grad_enabled():
            return None
        wanted = getattr(torch, signature.dtypes[name])
        if x.dtype != wanted:
            if wanted.is_floating_point or x.is_floating_point():
                return None
            x = x.to(wanted)
        found.append(x if x.is_contiguous() else x.contiguous())
    return found


def _default(name: str, ids: Any) -> Tensor | None:
    """What transformers takes where an input is left out."""
    if not isinstance(ids, Tensor):
        return None
    if name == "attention_mask":
        return torch.ones_like(ids)
    return torch.zeros_like(ids) if name == "token_type_ids" else None


def size_of(signature: Signature, inputs: list[Tensor]) -> Size | None:
    """Rows and tokens of a call; None where inputs disagree, or there is nothing in them."""
    seen: dict[str, set[int]] = {ROWS: set(), TOKENS: set()}
    for x, axes in zip(inputs, signature.inputs.values(), strict=True):
        for n, axis in zip(x.shape, axes, strict=True):
            if axis in seen:
                seen[axis].add(n)
    rows, tokens = seen[ROWS], seen[TOKENS]
    if len(rows) != 1 or len(tokens) > 1 or 0 in rows | tokens:
        return None
    return rows.pop(), tokens.pop() if tokens else None


def output_class(name: str, model: type) -> Any:
    """A class of transformers by the name that a manifest has; ModelOutput and no other."""
    known: Any = _output_class  # a class is hashable, which mypy does not know
    return known(name, model)


@cache
def _output_class(name: str, model: Any) -> Any:
    places = [transformers.modeling_outputs, *map(inspect.getmodule, model.__mro__)]
    for place in places:
        found = getattr(place, name, None)
        if isinstance(found, type) and issubclass(found, transformers.utils.ModelOutput):
            return found
    raise AttributeError(f"transformers has no {name}")


def _device_dtype(model: Any) -> tuple[torch.device, torch.dtype]:
    parameter = next(model.parameters())
    return parameter.device, parameter.dtype


def _hooks(model: nn.Module) -> list[Any]:
    inner = [m for m in model.modules() if m is not model]
    return [h for m in inner for h in (m._forward_hooks, m._forward_pre_hooks)]


def _rebuild(base: Any) -> nn.Module:
    cls = served_class(base)
    return cls.__new__(cls)
