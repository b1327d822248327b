"""The float twin of a QuantLinear: the same numbers, but its codes, scales and bias can be learned.

    code  = clamp(round(code_0 + offset))                 weight_scale = scale_0 * exp(log_scale)
    x_hat = the input's grid, its step times exp(log_input_scale), its zero point learned

Rounding passes gradients straight through; a step's gradient follows from that (LSQ, Esser et al.
2020, https://arxiv.org/abs/1902.08153).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qtk.grids import InputGrid, LinearSpec, Steps
from qtk.modules.fused.block import FusedBlock
from qtk.modules.linear import QuantLinear
from qtk.numerics import EPS


class TrainableLinear(nn.Module):
    """Stands in for a QuantLinear while it is learned. N outputs, K inputs, G groups.

    Parameters:
        offset: [N, K] float32, in steps of the grid, 0 at first.
        log_scale: [N, G]. bias: [N], where the layer has one.
        log_input_scale: scalar, for quantized inputs. input_zero_point: scalar, for static ones.

    Attributes:
        kept: share of the input elements that are quantized; the rest pass in floating point
            (QDrop, Wei et al. 2022, https://arxiv.org/abs/2203.05740), drawn from `generator`.
    """

    bias: Tensor | None
    generator: torch.Generator | None
    log_input_scale: Tensor | None
    input_zero_point: Tensor | None

    def __init__(self, layer: QuantLinear, kept: float = 1.0) -> None:
        super().__init__()
        self.layer = (layer,)  # in a tuple, so that it is no submodule
        self.grid: InputGrid = layer.grid
        self.kept, self.generator = kept, None
        self.codes, self.scale = layer.codes().float(), layer.weight_scale.clone()
        self.zero_point: Tensor | None = layer.weight_zero_point
        self.fmt = layer.w
        self.offset = nn.Parameter(torch.zeros_like(self.codes))
        self.log_scale = nn.Parameter(torch.zeros_like(self.scale))
        bias, zero_point = layer.bias, self.grid.zero_point
        new = self.scale.new_zeros(())
        quantized, static = self.grid.fmt is not None, zero_point is not None
        self.bias = nn.Parameter(bias.clone()) if bias is not None else None
        self.log_input_scale = nn.Parameter(new) if quantized else None
        self.input_zero_point = nn.Parameter(zero_point.float()) if static else None  # type: ignore

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N] in x's dtype."""
        return F.linear(self.quantized(x), self.weight(), self.bias).to(x.dtype)

    def weight(self) -> Tensor:
        """[N, K], on its grid."""
        codes = _Rounded.apply(self.codes + self.offset, self.fmt.qmin, self.fmt.qmax)
        return self.steps().dequantize(codes)

    def steps(self) -> Steps:
        return Steps(self.fmt, self.scale * self.log_scale.exp(), self.zero_point)

    def input_factor(self) -> Tensor:
        """The logarithm of what the input's step is multiplied by: a clip never exceeds 1."""
        assert self.log_input_scale is not None
        if self.input_zero_point is not None:
            return self.log_input_scale
        return self.log_input_scale.clamp(max=-math.log(self.grid.clip))

    def quantized(self, x: Tensor) -> Tensor:
        """The input, transformed and on its grid, float32."""
        y, fmt = self.grid.change.inputs(x), self.grid.fmt
        if fmt is None or self.log_input_scale is None:
            return y
        if self.input_zero_point is not None and self.grid.scale is not None:
            step = self.grid.scale * self.log_input_scale.exp()
            zero_point = _Rounded.apply(self.input_zero_point, fmt.qmin, fmt.qmax)
            y_hat = (_Rounded.apply(y / step + zero_point, fmt.qmin, fmt.qmax) - zero_point) * step
        else:
            reach = y.detach().abs().amax(-1, keepdim=True).clamp(min=EPS) * self.grid.clip
            step = reach * self.input_factor().exp() / fmt.qmax
            y_hat = _Rounded.apply(y / step, fmt.qmin, fmt.qmax) * step
        if self.kept < 1:
            drawn = torch.empty_like(y).uniform_(generator=self.generator)
            y_hat = torch.where(drawn < self.kept, y_hat, y)
        return y_hat

    @torch.no_grad()
    def finished(self) -> QuantLinear:
        """What was learned, in integers."""
        fmt, grid = self.grid.fmt, self.grid
        codes = (self.codes + self.offset).round().clamp(self.fmt.qmin, self.fmt.qmax)
        if fmt is not None and self.log_input_scale is not None:
            factor = self.input_factor().exp()
            if grid.scale is not None and self.input_zero_point is not None:
                zero_point = self.input_zero_point.round().clamp(fmt.qmin, fmt.qmax)
                grid = replace(grid, scale=grid.scale * factor, zero_point=zero_point)
            else:
                grid = replace(grid, clip=min(float(grid.clip * factor), 1.0))
        spec = LinearSpec(codes.to(torch.int8), self.steps(), grid, self.bias)
        return self.layer[0].like(spec)


@contextmanager
def trainable(model: nn.Module, kept: float = 1.0) -> Iterator[dict[str, TrainableLinear]]:
    """Every QuantLinear in `model` as its trainable twin, by name; integers again at the end."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    twins = {name: TrainableLinear(layer, kept) for name, layer in layers.items()}
    _put(model, twins)
    try:
        yield twins
    except BaseException:
        _put(model, layers)
        raise
    _put(model, {name: twin.finished() for name, twin in twins.items()})


def _put(model: nn.Module, modules: Any) -> None:
    for name, module in modules.items():
        model.set_submodule(name, module)
    for block in model.modules():
        if isinstance(block, FusedBlock):
            block.prepare()  # its parts were made of the linears that were there before


class _Rounded(torch.autograd.Function):
    """Rounding to an integer in [lo, hi]; backward the identity, zero where it clips."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lo: int, hi: int) -> Tensor:
        q = x.round()
        ctx.save_for_backward((q >= lo) & (q <= hi))
        return q.clamp_(lo, hi)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return grads[0] * inside, None, None
