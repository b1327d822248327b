"""Random precision training (RPT, Double-Win Quant, Fu et al. 2021, ICML): each batch draws its
bits, is attacked at these, and trains the weights and that precision's own norms.

The quantizer is the paper's: asymmetric and between the extremes, weights per output channel,
inputs per tensor, gradients straight through; norms are switched, the largest bits first in use.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from qtk.errors import SchemeError
from qtk.numerics import scale_and_zero_point
from qtk.robust.ball import cross_entropy, gradient, into_linf, uniform
from qtk.scheme import Format, is_positive_int

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm)
RULES = ("fgsm-rs", "pgd-7")
FGSM_STEP = 1.25  # of the budget: 10/255 for 8/255
PGD_STEPS, PGD_STEP = 7, 0.25
Say = Callable[[int, int, float], None]


def random_precision_training(
    model: nn.Module, pixels: Tensor, labels: Tensor, *, bits: Iterable[int] = range(4, 9),
    rule: str = "fgsm-rs", budget: float = 8 / 255, epochs: int = 10, batch_size: int = 128,
    rate: float = 0.05, mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.5, 0.5, 0.5), seed: int = 0,
    say: Say = lambda epoch, epochs, loss: None,
) -> "SwitchablePrecision":  # fmt: skip
    """Trains a copy of a classifier to be right under attack at every precision that it draws.

    Args:
        model: reads [B, C, H, W], or `pixel_values=` where it is of transformers; linears and
            convolutions are quantized but for the last linear, norms are switched.
        pixels: [N, C, H, W] in [0, 1]; `labels` [N].
        bits: of weights and inputs, 2 to 16; one value is ordinary adversarial training.
        rule: "fgsm-rs" (one step of 1.25 budgets from a random start) or "pgd-7".
        budget: linf.
        epochs, batch_size, rate: SGD with momentum .9 and weight decay 5e-4; the rate rises over
            the first fifth and falls to zero.
        mean, std: of the normalisation inside.
        seed: of batches, draws and starts.
        say: told epoch, epochs and the mean loss.

    Raises:
        SchemeError: bits, rule or sizes that there are not.
    """
    chosen = tuple(sorted({*bits}))
    if not chosen or chosen[0] < 2 or chosen[-1] > 16:
        raise SchemeError(f"bits={chosen}: choose among 2 to 16")
    if rule not in RULES:
        raise SchemeError(f"rule={rule!r}: choose among {RULES}")
    if not (is_positive_int(epochs) and is_positive_int(batch_size) and len(pixels)):
        raise SchemeError("epochs, batch_size and the number of images must be above zero")
    net = SwitchablePrecision(copy.deepcopy(model), chosen, seed)
    reader = _Normalized(net, mean, std)
    optimizer = torch.optim.SGD(net.parameters(), rate, momentum=0.9, weight_decay=5e-4)
    batches = -(-len(pixels) // batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, partial(share_of_rate, total=epochs * batches)
    )
    generator = Generator().manual_seed(seed)
    for epoch in range(epochs):
        order, total = torch.randperm(len(pixels), generator=generator), 0.0
        for rows in order.split(batch_size):
            net.switch(chosen[int(torch.randint(len(chosen), (1,), generator=generator))])
            x, y = pixels[rows], labels[rows]
            net.eval()
            moved = _attacked(reader, x, y, budget, rule, generator)
            net.train()
            optimizer.zero_grad()
            loss = F.cross_entropy(reader(moved), y)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * len(rows)
        say(epoch + 1, epochs, total / len(pixels))
    return net.eval()


def share_of_rate(step: int, total: int) -> float:
    """Rises over the first fifth of the steps, then falls to zero, both in a straight line."""
    peak = max(1, total // 5)
    return (step + 1) / peak if step < peak else (total - step) / max(1, total - peak)


class SwitchablePrecision(nn.Module):
    """A network in floating point that computes as if in few bits, with norms of its own for each.

    Attributes:
        bits: it can be switched to; `forward` draws among them, one for each sample.
    """

    def __init__(self, model: nn.Module, bits: tuple[int, ...], seed: int = 0) -> None:
        super().__init__()
        self.model, self.bits = model, bits
        linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        for name, module in list(model.named_modules()):
            made: nn.Module | None = None
            if isinstance(module, NORMS):
                made = SwitchableNorm(module, bits)
            elif isinstance(module, nn.Conv2d | nn.Linear) and name != (linears or [""])[-1]:
                made = FakeQuantized(module)
            if made is not None:
                parent, _, last = name.rpartition(".")
                setattr(model.get_submodule(parent), last, made)
        self.reseed(seed)
        self.switch(bits[-1])

    def reseed(self, seed: int) -> None:
        """Begins the draws anew."""
        self.generator = Generator().manual_seed(seed)

    def switch(self, bits: int) -> None:
        """Every layer to so many bits."""
        for module in self.model.modules():
            if isinstance(module, SwitchableNorm | FakeQuantized):
                module.bits = bits

    def at(self, bits: int, pixel_values: Tensor) -> Tensor:
        """Logits [B, classes] at so many bits."""
        self.switch(bits)
        return self.logits(pixel_values)

    def logits(self, x: Tensor) -> Tensor:
        named = hasattr(self.model, "config")
        out: Any = self.model(pixel_values=x).logits if named else self.model(x)
        found: Tensor = out
        return found

    def forward(self, pixel_values: Tensor) -> Any:
        """An output whose `logits` were answered at drawn bits, one for each sample."""
        places = torch.randint(len(self.bits), (len(pixel_values),), generator=self.generator)
        logits: Tensor | None = None
        for place in places.unique().tolist():
            own = places == place
            found = self.at(self.bits[place], pixel_values[own])
            if logits is None:
                logits = found.new_zeros(len(pixel_values), found.shape[1])
            logits = logits.index_put((own.nonzero()[:, 0],), found)
        return SimpleNamespace(logits=logits)


class SwitchableNorm(nn.Module):
    """Norms with statistics and gains of their own, one for each number of bits."""

    def __init__(self, norm: nn.Module, bits: tuple[int, ...]) -> None:
        super().__init__()
        self.norms = nn.ModuleDict({f"{b}": copy.deepcopy(norm) for b in bits})
        self.bits = bits[-1]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norms[f"{self.bits}"](x)
        return y


class FakeQuantized(nn.Module):
    """A linear or convolution whose weight and input are rounded; at 16 bits they are not."""

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.layer, self.bits = layer, 16

    @property
    def weight(self) -> Tensor:
        """The float weight, whose dtype transformers asks for."""
        return self.layer.weight

    def forward(self, x: Tensor) -> Tensor:
        layer, weight = self.layer, self.layer.weight
        if self.bits < 16:
            flat, shape = weight.detach().flatten(1), (-1, *[1] * (weight.dim() - 1))
            lo, hi = (end.view(shape) for end in (flat.amin(1), flat.amax(1)))
            weight = rounded(weight, lo, hi, self.bits)
            x = rounded(x, x.detach().amin(), x.detach().amax(), self.bits)
        if isinstance(layer, nn.Conv2d):
            return F.conv2d(x, weight, layer.bias, layer.stride, layer.padding, layer.dilation,
                            layer.groups)  # fmt: skip
        return F.linear(x, weight, layer.bias)


def rounded(x: Tensor, lo: Tensor, hi: Tensor, bits: int) -> Tensor:
    """x on the grid of lo to hi, its gradient that of x."""
    fmt = Format(bits, symmetric=False, granularity="tensor")
    scale, zero_point = scale_and_zero_point(lo, hi, fmt)
    codes = (torch.round(x.detach() / scale) + zero_point).clamp(fmt.qmin, fmt.qmax)
    return x + ((codes - zero_point) * scale - x.detach())


class _Normalized(nn.Module):
    """[0, 1] -> logits at the bits in use."""

    def __init__(
        self, net: SwitchablePrecision, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self._held = (net,)
        self.mean, self.std = (torch.tensor(v).view(1, -1, 1, 1) for v in (mean, std))

    def forward(self, x: Tensor) -> Tensor:
        return self._held[0].logits((x - self.mean) / self.std)


def _attacked(
    model: nn.Module, x: Tensor, y: Tensor, budget: float, rule: str, generator: Generator
) -> Tensor:
    """From a random start, by the rule."""
    steps, step = (1, FGSM_STEP) if rule == "fgsm-rs" else (PGD_STEPS, PGD_STEP)
    moved = into_linf(x + budget * (2 * uniform(x, generator) - 1), x, budget)
    for _ in range(steps):
        _, _, grad = gradient(model, moved, lambda z: cross_entropy(z, y))
        moved = into_linf(moved + step * budget * grad.sign(), x, budget)
    return moved
