"""InI: Isolation and Induction (ACM MM 2023, github.com/DIG-Beihang/InI-Model-Stealing-Defense).

V are the victim's logits, S those of a thief that is simulated: a network with random weights,
frozen. x are images with labels y, o images from outside. cen(l) = l - mean_k l, and all gradients
of K are with respect to the parameters of S:

    D(V, S) = mean |S - cen(V)|                         over batch and classes
    K(S, V) = mean_b sum_k p_S (log p_S - log p_V)
    L = CE(V(x), y) - beta D(V(x), S(x)) + gamma D(V(o), S(o))
        + delta cos(grad K(S(x), V(x)), grad CE(S(x), y)) + epsilon mean |grad K(S(o), V(o))|

The fourth term, isolation, turns what a thief would learn from x away from what is useful; the
fifth, induction, leaves it nothing to learn from o. Second derivatives flow through S alone, so
that S is a CNN or an MLP and V any model.

Where two terms' gradients conflict, PCGrad (Yu et al., NeurIPS 2020) takes off each what points
against the other, in random order; their mean is the step. Formulas and weights are those of the
authors' code.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qtk.errors import CalibrationError, ModelError, SchemeError
from qtk.fidelity.compare import class_logits
from qtk.modules.linear import QuantLinear
from qtk.pipeline.progress import progress_bar
from qtk.security.clone import build

RELEASED = 11.2e6  # parameters of S, a ResNet-18, for which epsilon = 1000 was chosen
BATCH = 128
CLIP = 10.0


@dataclass(frozen=True)
class Epoch:
    """Means over one epoch: what `log` is called with."""

    epoch: int
    classification: float
    outside: float
    isolation: float
    induction: float


def harden(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    outside: Tensor,
    student: nn.Module | None = None,
    *,
    beta: float = 0.0,
    gamma: float = 0.3,
    delta: float = 1.0,
    epsilon: float = 1000.0,
    epochs: int = 4,
    lr: float = 1e-3,
    pcgrad: bool = True,
    seed: int = 0,
    log: list[Epoch] | None = None,
    progress: bool = True,
) -> nn.Module:
    """A copy of an image classifier that was trained on so that its answers teach a thief little.

    It is a defence against queries from outside alone: with images of the model's own kind a thief
    gets what it always did, so look at both rows of `qtk.steal`. Quantize afterwards.

    Args:
        model: in floating point, trained or not.
        data: images [N, C, H, W] and labels [N].
        outside: images [M, C, H, W] of another kind, as thieves would ask with.
        student: S; None is a small CNN with random weights.
        beta, gamma, delta: weights of the terms above.
        epsilon: for S with 11.2 million parameters. The mean of |grad| over n parameters falls as
            1 / sqrt(n) where its norm stays, so that the weight is epsilon sqrt(n / 11.2e6).
        epochs: over `data`.
        lr: of AdamW, which falls along a cosine.
        pcgrad: False adds the terms up and clips the gradient's norm at 10.
        seed: of S, of the order of images and of PCGrad.
        log: gets the terms' means of every epoch.
        progress: shows a bar.

    Raises:
        ModelError: a quantized model, or one that does not classify images.
        CalibrationError: images or labels that do not fit.
        SchemeError: a negative weight, or no epoch.
    """
    images, labels = _check(model, data, outside)
    if min(beta, gamma, delta, epsilon) < 0 or epochs < 1:
        raise SchemeError("weights of terms are not negative, and an epoch is needed")
    victim = copy.deepcopy(model)
    with torch.no_grad():
        classes = _logits(victim.eval(), images[:1]).shape[1]
    if int(labels.max()) >= classes or int(labels.min()) < 0:
        raise CalibrationError(f"labels reach {int(labels.max())}; the model has {classes} classes")
    student = student or build("cnn", images.shape[1], classes, seed)
    student = student.eval().requires_grad_(True)
    size = sum(p.numel() for p in student.parameters())
    terms = _Terms(student, beta, gamma, delta, epsilon * math.sqrt(size / RELEASED))
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for p in victim.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr)
    steps = epochs * (len(images) // min(BATCH, len(images)))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    victim.train()
    with torch.enable_grad(), progress_bar(progress) as bar:
        for epoch in range(epochs):
            seen: list[list[float]] = []
            order = torch.randperm(len(images), generator=generator).split(BATCH)
            for chosen in [part for part in order if len(part) == min(BATCH, len(images))]:
                other = torch.randint(len(outside), (len(chosen),), generator=generator)
                bar.show("isolating", epoch * len(order) + len(seen), epochs * len(order))
                losses = terms(victim, images[chosen], labels[chosen], outside[other])
                seen.append([float(loss.detach()) for loss in losses])
                _step(losses, terms.weights, parameters, optimizer, generator, pcgrad)
                schedule.step()
            if log is not None:
                means = torch.tensor(seen).mean(0).tolist()
                log.append(Epoch(epoch, means[0], means[2], means[3], means[4]))
    return victim.eval()


class _Terms:
    """The five terms without their weights, of one batch."""

    def __init__(
        self, student: nn.Module, beta: float, gamma: float, delta: float, epsilon: float
    ) -> None:
        self.student, self.parameters = student, list(student.parameters())
        self.weights = (1.0, -beta, gamma, delta, epsilon)

    def __call__(self, victim: nn.Module, x: Tensor, y: Tensor, o: Tensor) -> list[Tensor]:
        inner, outer = _logits(victim, x), _logits(victim, o)  # apart: each term needs one of them
        s_inner, s_outer = self.student(x), self.student(o)
        taught = self.gradient(divergence(s_inner, inner))
        useful = self.gradient(F.cross_entropy(s_inner, y)).detach()
        return [
            F.cross_entropy(inner, y),
            distance(inner, s_inner.detach()),
            distance(outer, s_outer.detach()),
            F.cosine_similarity(taught, useful, dim=0),
            self.gradient(divergence(s_outer, outer)).abs().mean(),
        ]

    def gradient(self, loss: Tensor) -> Tensor:
        """Of all parameters of S, in one vector through which derivatives flow."""
        return torch.cat([
            g.reshape(-1) for g in torch.autograd.grad(loss, self.parameters, create_graph=True)
        ])  # fmt: skip


def distance(victim: Tensor, student: Tensor) -> Tensor:
    """D of logits [B, K]: the victim's are centred, the student's are not."""
    return (student - (victim - victim.mean(1, keepdim=True))).abs().mean()


def divergence(student: Tensor, victim: Tensor) -> Tensor:
    """K of logits [B, K]: KL(student || victim), mean over the batch, nats."""
    p = student.log_softmax(1)
    return (p.exp() * (p - victim.log_softmax(1))).sum(1).mean()


def project(gradients: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """PCGrad: [n] each -> [n], the mean of what is left of each after conflicts with the others."""
    found = []
    for i, own in enumerate(gradients):
        left = own.clone()
        for j in torch.randperm(len(gradients), generator=generator).tolist():
            other = gradients[j]
            against = torch.dot(left, other)
            if i != j and against < 0:
                left -= against / other.square().sum() * other
        found.append(left)
    return torch.stack(found).mean(0)


def _step(
    losses: Sequence[Tensor], weights: Sequence[float], parameters: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer, generator: torch.Generator, pcgrad: bool,
) -> None:  # fmt: skip
    optimizer.zero_grad()
    active = [w * loss for w, loss in zip(weights, losses, strict=True) if w]
    if pcgrad:
        gradients = [_flat(loss, parameters) for loss in active]
        step, start = project(gradients, generator), 0
        for p in parameters:
            p.grad = step[start : start + p.numel()].view_as(p)
            start += p.numel()
    else:
        torch.stack(active).sum().backward(inputs=list(parameters))
        nn.utils.clip_grad_norm_(parameters, CLIP)
    optimizer.step()


def _flat(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return torch.cat([
        (torch.zeros_like(p) if g is None else g).reshape(-1)
        for p, g in zip(parameters, found, strict=True)
    ])  # fmt: skip


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    return class_logits(model, model(images), "harden needs a classifier of images")


def _check(model: nn.Module, data: tuple[Tensor, Tensor], outside: Tensor) -> tuple[Tensor, Tensor]:
    if any(isinstance(module, QuantLinear) for module in model.modules()):
        raise ModelError("harden trains the float model: give that, and quantize what comes back")
    if getattr(model, "main_input_name", "pixel_values") != "pixel_values":
        raise ModelError(f"{type(model).__name__} reads no images: harden is for those that do")
    images, labels = data
    if len(images) != len(labels) or not len(images) or labels.is_floating_point():
        raise CalibrationError(
            f"{len(images)} images and {len(labels)} labels ({labels.dtype}); give a class number "
            "for each"
        )
    if outside.shape[1:] != images.shape[1:] or not len(outside):
        raise CalibrationError(
            f"images from outside have shape {list(outside.shape)}, the others "
            f"{list(images.shape)}; give the same size"
        )
    return images, labels
