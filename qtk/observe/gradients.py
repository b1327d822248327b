"""What an error costs the whole model: gradients of the float model's own predictions.

Bottom-elimination Blockwise Calibration (APQ-ViT, Ding et al. 2023, https://arxiv.org/abs/2303.14341)
weighs errors by the squared gradient of the KL divergence to the float model. At the float model
itself that gradient is zero, so its second-order term is taken as it is defined: the Fisher
information E[g g^T], g being the gradient of log p(y) at labels y drawn from the model's own p. A
model without logits has its last hidden state's Gauss-Newton matrix, g being the gradient of a
random projection.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qtk.models import Block
from qtk.observe.probe import Gradients
from qtk.observe.site import Batch
from qtk.observe.walk import forward


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

    Raises:
        CalibrationError: the model cannot read a batch.
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
            score = _score(forward(model, batch, index), batch, generator)
        finally:
            for handle in handles:
                handle.remove()
        B = len(outputs[blocks[0].name])
        grads = torch.autograd.grad(score, [outputs[name] for name in names])
        for name, grad in zip(names, grads, strict=True):
            grad = grad.detach().float().reshape(B, -1, grad.shape[-1])
            found[name].append(grad.square().mean(0).sqrt())  # one draw a sequence is noise
    return {name: _normalized(grads) for name, grads in found.items()}


@torch.enable_grad()
def curvatures(
    model: nn.Module, blocks: Sequence[Block], batches: Sequence[Batch], seed: int = 0
) -> dict[str, Tensor]:
    """What errors in the outputs of each layer cost the model's answers, to second order.

    The divergence of the answers under an error e [places, N] of a layer's output is near
    e C e^T / 2 summed over the places: C = E[g g^T], g as above, a place at a time.

    Args:
        model: in floating point and eval mode; layers that do not run have none.
        seed: of the labels that are drawn.

    Returns:
        {full name: [N, N] float32}, each scaled so that its diagonal has mean 1.

    Raises:
        CalibrationError: the model cannot read a batch.
    """
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    for index, batch in enumerate(batches):
        outputs: dict[str, Tensor] = {}
        handles = [
            model.get_submodule(name).register_forward_hook(_branch(outputs, name))
            for block in blocks
            for name in block.linears
        ]
        try:
            score = _score(forward(model, batch, index), batch, generator)
        finally:
            for handle in handles:
                handle.remove()
        grads = torch.autograd.grad(score, [*outputs.values()])
        for name, grad in zip(outputs, grads, strict=True):
            rows = grad.flatten(2).mT if grad.dim() == 4 else grad
            rows = rows.reshape(-1, rows.shape[-1]).double()
            found[name] = found.get(name, 0) + rows.T @ rows
    sizes = {name: c.diagonal().mean().clamp(min=1e-30) for name, c in found.items()}
    return {name: (c / sizes[name]).float() for name, c in found.items()}


def _branch(outputs: dict[str, Tensor], name: str) -> Callable[..., Tensor]:
    """A forward hook that keeps an output to differentiate by, and hands on a copy of it, which
    whatever computes in place may overwrite."""

    def keep(_: Any, __: Any, out: Tensor) -> Tensor:
        outputs[name] = out if out.requires_grad else out.detach().requires_grad_()
        return outputs[name].clone()

    return keep


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
    logits = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
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
