"""Random precision: one quantized model whose every sample draws the bits that it is answered in.

Double-Win Quant (Fu et al. 2021, ICML) observes of adversarially trained networks that what is
crafted at one precision transfers badly to another. Codes of fewer bits are the stored codes,
rounded:

    code_b = clamp(round(code / 2^(8 - b)), -2^(b-1), 2^(b-1) - 1),   scale_b = scale 2^(8 - b)

and the input's grid has the same ends with fewer steps, so that nothing else is stored.
"""

from collections.abc import Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Generator, Tensor, nn

from qtk.assembly import fused_blocks
from qtk.errors import SchemeError
from qtk.grids import LinearSpec, Steps
from qtk.modules.linear import QuantLinear
from qtk.numerics import scale_and_zero_point
from qtk.scheme import ACTIVATION_BITS, Format

DRAWS = ("sample", "batch")


def random_precision(
    qmodel: nn.Module, bits: Iterable[int] = range(4, 9), draw: str = "sample", seed: int = 0,
    keep: bool = False,
) -> "RandomPrecision":  # fmt: skip
    """The same model, answering each sample with bits drawn uniformly from `bits`.

    Args:
        qmodel: quantized with w=8 and a=8; it is changed by every draw, so give a copy to keep it.
        bits: of weights and activations, 4 to 8.
        draw: "sample", each row of a batch by itself, or "batch", one for all rows.
        seed: of the draws.
        keep: every precision stays prepared once it was in use: switches are free, and memory holds
            a copy of the codes for each.

    Raises:
        SchemeError: bits that the model has not stored, or none.
    """
    layers = {n: m for n, m in qmodel.named_modules() if isinstance(m, QuantLinear)}
    chosen = tuple(sorted({*bits}))
    if not chosen or any(b not in ACTIVATION_BITS for b in chosen):
        raise SchemeError(f"bits={chosen}: choose among {ACTIVATION_BITS}")
    if draw not in DRAWS:
        raise SchemeError(f"draw={draw!r}: choose among {DRAWS}")
    if not layers:
        raise SchemeError("random_precision needs a quantized model: qtk.quantize(model, w=8, a=8)")
    for name, layer in layers.items():
        w, a = layer.scheme.w, layer.scheme.a
        if w is None or a is None or (w.bits, a.bits, w.kind, w.symmetric) != (8, 8, "int", True):
            raise SchemeError(f"{name} is {layer.scheme.name}: quantize it with w=8 and a=8")
    return RandomPrecision(qmodel, chosen, draw, seed, keep)


def lowered(spec: LinearSpec, bits: int) -> LinearSpec:
    """A layer of 8 bits in fewer: codes and input grid rounded, ends kept."""
    if bits == 8:
        return spec
    factor, fmt = 2 ** (8 - bits), replace(spec.steps.fmt, bits=bits)
    codes = torch.round(spec.codes.float() / factor).clamp(fmt.qmin, fmt.qmax).to(torch.int8)
    a = spec.grid.fmt
    assert a is not None
    grid = replace(spec.grid, fmt=replace(a, bits=bits))
    if spec.grid.static is not None:
        scale, zero_point = _narrowed(spec.grid.static, a, replace(a, bits=bits))
        grid = replace(grid, scale=scale, zero_point=zero_point)
    return LinearSpec(codes, Steps(fmt, spec.steps.scale * factor), grid, spec.bias)


def _narrowed(static: tuple[Tensor, Tensor], old: Format, new: Format) -> tuple[Tensor, Tensor]:
    scale, zero_point = static[0], static[1].float()
    return scale_and_zero_point((old.qmin - zero_point) * scale, (old.qmax - zero_point) * scale,
                                new)  # fmt: skip


class RandomPrecision(nn.Module):
    """A quantized model of transformers that switches its bits.

    Attributes:
        model: what answers, at the bits of `switch`.
        bits: what is drawn from.
    """

    def __init__(
        self, model: nn.Module, bits: tuple[int, ...], draw: str, seed: int, keep: bool = False
    ) -> None:
        super().__init__()
        self.model, self.bits, self.draw, self.keep = model, bits, draw, keep
        layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
        self._stored = [(layer, layer.spec()) for layer in layers]
        self.blocks = list(fused_blocks(model).values())
        self._parts: list[Any] = [*layers, *self.blocks]
        self._now = 8
        self._kept: dict[int, list[Any]] = {}
        self.reseed(seed)
        self.eval()

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def main_input_name(self) -> str:
        return str(getattr(self.model, "main_input_name", "input_ids"))

    def reseed(self, seed: int) -> None:
        """Begins the draws anew."""
        self.generator = Generator().manual_seed(seed)

    def switch(self, bits: int) -> None:
        """Every layer to so many bits of weights and activations; nothing where it has them."""
        if bits == self._now:
            return
        if self.keep:
            self._kept[self._now] = [part.snapshot() for part in self._parts]
        if bits in self._kept:
            for part, found in zip(self._parts, self._kept[bits], strict=True):
                part.restore(found)
        else:
            for layer, spec in self._stored:
                layer.become(lowered(spec, bits))
            for block in self.blocks:
                block.prepare()
        self._now = bits

    def _apply(self, fn: Any, recurse: bool = True) -> "RandomPrecision":
        self._kept.clear()  # it is where the model was
        super()._apply(fn, recurse)
        return self

    def at(self, bits: int, **batch: Any) -> Tensor:
        """Logits of the batch at so many bits."""
        self.switch(bits)
        logits: Tensor = self.model(**batch).logits
        return logits

    def forward(self, **batch: Any) -> Any:
        """An output whose `logits` [B, ...] were answered at drawn bits."""
        rows = len(next(iter(batch.values())))
        count = rows if self.draw == "sample" else 1
        places = torch.randint(len(self.bits), (count,), generator=self.generator).expand(rows)
        found: list[Tensor] = []
        order = []
        for place in places.unique().tolist():
            own = (places == place).nonzero()[:, 0]
            part = {k: v[own.to(v.device)] for k, v in batch.items()}
            found.append(self.at(self.bits[place], **part))
            order.append(own)
        back = torch.cat(order).argsort()
        return SimpleNamespace(logits=torch.cat(found)[back.to(found[0].device)])

    def tensors(self) -> list[Tensor]:
        """What it holds beside the model: the stored codes, and what of other bits is kept."""
        now, found = self._now, [spec.codes for _, spec in self._stored]
        for bits in list(self._kept):
            self.switch(bits)
            found += [tensor for part in self._parts for tensor in part.tensors()]
        self.switch(now)
        return found


class Expected(nn.Module):
    """The mean of the logits over all precisions: what an attacker who knows of the draws attacks
    (EOT, Athalye et al. 2018, arXiv 1707.07397)."""

    def __init__(self, model: RandomPrecision) -> None:
        super().__init__()
        self._held = (model,)
        self.eval()

    @property
    def config(self) -> Any:
        return self._held[0].config

    def parameters(self, recurse: bool = True) -> Any:
        return self._held[0].parameters(recurse)

    def forward(self, **batch: Any) -> Any:
        model = self._held[0]
        logits = torch.stack([model.at(bits, **batch) for bits in model.bits])
        return SimpleNamespace(logits=logits.mean(0))
