"""What all modules that replace a float one have in common.

A file in qtk/modules with a class `LAYER` is a kind of layer; nothing else names the kinds.
"""

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qtk.discover import available, load
from qtk.errors import BackendError, ModelError
from qtk.scheme import Scheme
from qtk_kernels.dispatch import backend_of


class Float32Buffers(nn.Module):
    """Buffers keep their dtype under `.half()` and `.to(dtype)`: scales stay float32.

    What a kernel reads is built when the module is ready, and dropped while it moves.
    """

    def prepare(self) -> None:
        """Builds what the kernels read, on the device that the tensors are on."""

    def unprepare(self) -> None:
        """Back to the stored form alone."""

    @property
    def is_prepared(self) -> bool:
        return False

    def _apply(self, fn: Any, recurse: bool = True) -> "Float32Buffers":
        prepared = self.is_prepared
        self.unprepare()
        for module in self.children():
            module._apply(fn)
        for name, value in self._buffers.items():
            if value is not None:
                moved = fn(value)
                same = moved.dtype == value.dtype
                self._buffers[name] = moved if same else value.to(moved.device)
        if prepared:
            self.prepare()
        return self


class Quantized(Float32Buffers):
    """Stands where a float module was.

    Attributes:
        REPLACES: the class of that module.
        scheme: of its weight and input.
        kernel: the name of what really computes.
    """

    REPLACES: ClassVar[type[nn.Module]]
    scheme: Scheme
    kernel: str

    @classmethod
    def fits(cls, module: nn.Module | None) -> bool:
        """Whether it can stand for this float module."""
        return type(module) is cls.REPLACES

    @classmethod
    @abstractmethod
    def empty(
        cls, module: Any, scheme: Scheme, *, bias: bool, transform: bool, rotation: bool,
        backend: str,
    ) -> nn.Module:  # fmt: skip
        """Stands for `module` and waits for tensors.

        Args:
            bias, transform, rotation: whether there will be one.
            backend: "auto", "triton", "cpu" or "reference".
        """

    @abstractmethod
    def blank(self) -> nn.Module:
        """The same on the meta device: names, shapes and dtypes of what it holds."""

    @abstractmethod
    def dequantized(self) -> nn.Module:
        """The float module that computes the same but for the rounding of its input."""


def kind_of(module: nn.Module | None) -> type[Quantized] | None:
    """The class of qtk/modules that can stand for a float module, None if none can."""
    for name in available("modules"):
        layer = getattr(load("modules", name), "LAYER", None)
        if layer is not None and layer.fits(module):
            found: type[Quantized] = layer
            return found
    return None


def own(x: Tensor) -> Tensor:
    """A float32 copy: linears that share an input must not share tensors, or saving merges them."""
    return x.detach().float().clone().contiguous()


def refuse_floats(state: dict[str, Any], key: str) -> None:
    """Raises ModelError where a state_dict holds a float weight in the place of codes."""
    value = state.get(key)
    if isinstance(value, Tensor) and value.is_floating_point():
        raise ModelError(
            f"{key} is a float weight, and this model is quantized: load the checkpoint into the "
            "float model, then quantize that"
        )


def resolve_backend(x: Tensor, backend: str) -> str:
    """What runs on x's device when `backend` is asked for.

    Raises:
        BackendError: there is no such backend, or it cannot run there.
    """
    try:
        return backend_of(x, backend)
    except ValueError as error:
        raise BackendError(f"{error}; backend='auto' chooses by device") from None


def buffer(
    module: nn.Module, name: str, present: bool, *shape: int, device: Any,
    dtype: torch.dtype = torch.float32,
) -> None:  # fmt: skip
    """Registers zeros, or None where the layer has no such tensor."""
    value = torch.zeros(shape, dtype=dtype, device=device) if present else None
    module.register_buffer(name, value)
