"""What an error at a site costs: carried through the rest of the block, and weighed there by the
gradients of qtk/observe/gradients.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from qtk.models import Block

Gradients = dict[str, list[Tensor]]

TOKENS = 768  # that errors are carried through the block for; a search sees them once a candidate


@dataclass
class Part:
    """Some sequences of one calibration batch, where they enter the block and the site.

    Attributes:
        x: [B, T, K], what the site's linears read.
        hidden, args, kwargs: what the block is called with.
        mask: [B, T] bool, False at padding.
    """

    x: Tensor
    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mask: Tensor
    batch: int


@dataclass
class Probe:
    """One site of one block. C candidates, B sequences, T tokens, K and N channels.

    Attributes:
        module: the block, its earlier sites quantized.
        weights: [N, K] of the site's linears by full name, for inputs as `effect` gets them.
        gradients: of the block's and its linears' outputs, by name, a tensor a calibration batch.
        inputs: [B, T, K] of every part, as errors are added to them.
    """

    module: nn.Module
    block: Block
    weights: dict[str, Tensor]
    parts: list[Part]
    gradients: Gradients
    inputs: list[Tensor] = field(default_factory=list)

    def changed(
        self, inputs: Callable[[Tensor], Tensor], weight: Callable[[Tensor], Tensor]
    ) -> "Probe":
        """The same after a change of variable."""
        return replace(
            self, inputs=[inputs(part.x) for part in self.parts],
            weights={name: weight(w) for name, w in self.weights.items()},
        )  # fmt: skip

    @torch.no_grad()
    def effect(self, index: int, errors: Tensor, granularity: str) -> tuple[Tensor, Tensor]:
        """What errors in the site's input change, at its linears' outputs or at the block's.

        Args:
            index: of the part.
            errors: [C, B, T, K].
            granularity: "layer" or "block".

        Returns:
            difference [C, n] and gradient [n] over all elements that are not padding.
        """
        part = self.parts[index]
        deltas = {name: errors @ weight.T for name, weight in self.weights.items()}
        if granularity == "layer":
            difference = torch.cat(list(deltas.values()), -1)
            gradient = torch.cat([self.gradient(name, part) for name in deltas], -1)
        else:
            C = len(errors)
            wanted = self.run(part, {name: d[:1] * 0 for name, d in deltas.items()}, 1)
            difference = self.run(part, deltas, C) - wanted
            gradient = self.gradient(self.block.name, part)
        return difference[:, part.mask].flatten(1), gradient[part.mask].flatten()

    def gradient(self, name: str, part: Part) -> Tensor:
        return self.gradients[name][part.batch].expand(*part.mask.shape, -1)

    def run(self, part: Part, deltas: dict[str, Tensor], C: int) -> Tensor:
        """[C, B, T, H], the block's output with something added to its linears' outputs."""
        B = len(part.hidden)

        def repeated(value: Any) -> Any:
            per_sequence = isinstance(value, Tensor) and value.dim() > 1 and len(value) == B
            return value.repeat(C, *[1] * (value.dim() - 1)) if per_sequence else value

        handles = []
        for name, delta in deltas.items():

            def add(_: Any, __: Any, out: Tensor, delta: Tensor = delta) -> Tensor:
                return out + delta.reshape(out.shape)

            linear = self.module.get_submodule(self.block.inside(name))
            handles.append(linear.register_forward_hook(add))
        try:
            kwargs = {key: repeated(value) for key, value in part.kwargs.items()}
            out = self.module(repeated(part.hidden), *map(repeated, part.args), **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        out = out if isinstance(out, Tensor) else out[0]
        return out.unflatten(0, (C, B))


def parts_of(calls: Sequence[Any], inputs: Sequence[Tensor]) -> list[Part]:
    """About TOKENS tokens of the calls, whole sequences, a share of every call."""
    total = sum(x.shape[0] * x.shape[1] for x in inputs)
    parts = []
    for i, (call, x) in enumerate(zip(calls, inputs, strict=False)):
        n, B = max(1, x.shape[0] * TOKENS // max(total, 1)), x.shape[0]

        def cut(value: Any, n: int = n, B: int = B) -> Any:
            return value[:n] if isinstance(value, Tensor) and len(value) == B else value

        kwargs = {key: cut(value) for key, value in call.kwargs.items()}
        parts.append(Part(
            x[:n], call.hidden[:n], tuple(map(cut, call.args)), kwargs, call.mask[:n], i
        ))  # fmt: skip
    return parts
