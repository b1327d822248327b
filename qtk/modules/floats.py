"""The way back: a quantized model as a float one with the weights that its codes stand for."""

from torch import nn

from qtk.modules.attention import CHILD
from qtk.modules.base import Quantized
from qtk.modules.fused.block import FusedBlock, unfuse


def restore_floats(model: nn.Module) -> None:
    """Puts a float module in the place of every quantized one, in place.

    What remains of quantization is the rounding of weights; inputs are no longer rounded, and
    attention is in floating point.
    """
    restore_attention(model)
    unfuse(model)
    quantized = {n: m for n, m in model.named_modules() if isinstance(m, Quantized)}
    for name, module in quantized.items():
        if not any(name.startswith(f"{other}.") for other in quantized):
            model.set_submodule(name, module.dequantized())


def restore_attention(model: nn.Module) -> None:
    """Puts float attention in the place of quantized products and softmax, in place."""
    for parent in list(model.modules()):
        if CHILD in parent._modules:
            del parent._modules[CHILD]
            implementation = model.config._attn_implementation  # type: ignore[union-attr]
            parent.config._attn_implementation = implementation  # type: ignore[union-attr]
    for block in model.modules():
        if isinstance(block, FusedBlock):
            block.prepare()
