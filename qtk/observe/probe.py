"""What an error at a site costs: carried through the rest of the block, and weighed there.

Bottom-elimination Blockwise Calibration (APQ-ViT, Ding et al. 2023, https://arxiv.org/abs/2303.14341)
weighs errors by the squared gradient of the KL divergence to the float model. At the float model
itself that gradient is zero, so its second-order term is taken as it is defined: the Fisher
information E[g g^T], g being the gradient of log p(y) at labels y drawn from the model's own p. A
model without logits has its last hidden state's Gauss-Newton matrix, g being the gradient of a
random projection.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from qtk.models import Block
from qtk.observe.guard import reading

Batch = dict[str, Any]
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
        """The same behind a change of variable."""
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

            linear = self.module.get_submodule(name.removeprefix(f"{self.block.name}."))
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


@torch.enable_grad()
def block_gradients(
    model: nn.Module, blocks: Sequence[Block], batches: Sequence[Batch], seed: int = 0
) -> Gradients:
    """Gradients at the outputs of every block and of every linear in it, a tensor a batch.

    Args:
        model: in floating point and eval mode.
        seed: of the labels that are drawn.

    Returns:
        {full name: [[T, C] float32, ...]}, root mean squares over the sequences of a batch, scaled
        so that the mean square of all is 1.
    """
    generator = torch.Generator().manual_seed(seed)
    names = [n for b in blocks for n in (b.name, *(n for g in b.groups for n in g.linears))]
    found: Gradients = {name: [] for name in names}
    for index, batch in enumerate(batches):
        outputs: dict[str, Tensor] = {}
        handles = [model.get_submodule(blocks[0].name).register_forward_pre_hook(
            _leaf, with_kwargs=True
        )]  # fmt: skip
        for name in names:
            handles.append(model.get_submodule(name).register_forward_hook(_keeper(outputs, name)))
        try:
            with reading(f"calibration batch {index}"):
                score = _score(model(**batch), batch, generator)
        finally:
            for handle in handles:
                handle.remove()
        B = len(outputs[blocks[0].name])
        grads = torch.autograd.grad(score, [outputs[name] for name in names])
        for name, grad in zip(names, grads, strict=True):
            grad = grad.detach().float().reshape(B, -1, grad.shape[-1])
            found[name].append(grad.square().mean(0).sqrt())  # one draw a sequence is noise
    return {name: _normalized(grads) for name, grads in found.items()}


def _keeper(outputs: dict[str, Tensor], name: str) -> Callable[..., None]:
    """A forward hook that stores what a module puts out."""

    def keep(_: Any, __: Any, out: Any) -> None:
        outputs[name] = out if isinstance(out, Tensor) else out[0]

    return keep


def _leaf(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Makes the first block's input something to differentiate, whatever the parameters are."""
    if args:
        return (args[0].detach().requires_grad_(), *args[1:]), kwargs
    hidden = kwargs["hidden_states"].detach().requires_grad_()
    return args, {**kwargs, "hidden_states": hidden}


def _score(outputs: Any, batch: Batch, generator: torch.Generator) -> Tensor:
    """log p of labels drawn from p, or a random projection of the last hidden state."""
    logits = getattr(outputs, "logits", None)
    if logits is None:
        hidden = outputs[0]
        signs = torch.randint(0, 2, hidden.shape, generator=generator).to(hidden) * 2 - 1
        mask = batch.get("attention_mask")
        if mask is not None and tuple(mask.shape) == tuple(hidden.shape[:2]):
            signs = signs * mask[..., None]
        return (hidden * signs).sum()
    logp = logits.float().log_softmax(-1).flatten(0, -2)
    labels = torch.multinomial(logp.detach().exp().cpu(), 1, generator=generator).to(logp.device)
    chosen = logp.gather(1, labels)[:, 0]
    mask = batch.get("attention_mask")
    if mask is not None and mask.numel() == len(chosen):
        chosen = chosen * mask.flatten()
    return chosen.sum()


def _normalized(grads: list[Tensor]) -> list[Tensor]:
    size = torch.stack([g.square().mean() for g in grads]).mean().sqrt().clamp(min=1e-30)
    return [g / size for g in grads]
