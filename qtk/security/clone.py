"""The network that a thief teaches, and how: a small CNN, SGD, the victim's answers as labels."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qtk.errors import SchemeError

LR = 0.1
MOMENTUM = 0.9
DECAY = 5e-4
BATCH = 128
Build = Callable[[int, int], nn.Module]  # channels, classes


def cnn(channels: int, classes: int) -> nn.Module:
    """Two convolutions of stride 2 and a linear layer; images of any size."""
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(7), nn.Flatten(), nn.Linear(32 * 49, classes),
    )  # fmt: skip


def mlp(channels: int, classes: int) -> nn.Module:
    """A perceptron on images of 14 x 14: another architecture than the usual one."""
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(14), nn.Flatten(), nn.Linear(channels * 196, 128), nn.ReLU(),
        nn.Linear(128, classes),
    )  # fmt: skip


NETWORKS: dict[str, Build] = {"cnn": cnn, "mlp": mlp}


def build(network: str | Build, channels: int, classes: int, seed: int) -> nn.Module:
    """Untrained; the global random state stays as it is.

    Args:
        network: "cnn", "mlp", or a function of channels and classes.

    Raises:
        SchemeError: none of these.
    """
    make = NETWORKS.get(network) if isinstance(network, str) else network
    if not callable(make):
        raise SchemeError(f"no network {network!r}; give {', '.join(NETWORKS)} or a function")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make(channels, classes)


def teach(clone: nn.Module, inputs: Tensor, answers: Tensor, epochs: int, seed: int) -> nn.Module:
    """Teaches it in place, so that the last epoch counts and no test data is looked at.

    SGD with a cosine, momentum .9 and decay 5e-4; the loss is the batch's mean of
    KL(answer || clone), of which cross entropy with the one class of a hard answer is a case.

    Args:
        inputs: [N, C, H, W]; answers: [N, K], each a distribution.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(clone.parameters(), LR, momentum=MOMENTUM, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, max(1, epochs * -(-len(inputs) // BATCH))
    )
    clone.train()
    with torch.enable_grad():
        for _ in range(epochs):
            for chosen in torch.randperm(len(inputs), generator=generator).split(BATCH):
                optimizer.zero_grad()
                guess = clone(inputs[chosen]).log_softmax(1)
                F.kl_div(guess, answers[chosen], reduction="batchmean").backward()
                nn.utils.clip_grad_norm_(clone.parameters(), 10.0)
                optimizer.step()
                schedule.step()
    return clone.eval()
