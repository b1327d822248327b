"""A small PreActResNet learns under attack at random precisions, and is attacked by one who knows.

    python examples/random_precision.py [images.npz] [epochs]

`images.npz` holds pixels [N, 3, H, W] uint8 and labels [N]; a fifth, drawn, is for testing. Of
2,000 CIFAR-10 images ten epochs take minutes a network on one core. By default 300 coloured squares
serve. "drawn" attacks at bits drawn anew for each step, as the defender answers; "all" averages its
gradient over all precisions, and is what a claim of robustness has to survive.

    fixed, 8 bits
    attacked at  8 bits  drawn  std  95 %
    -----------  ------  -----  ---  ------------
    clean          98.3   98.3  0.0  91.1 to 99.7
    8              95.0   95.0  0.0  86.3 to 98.3
    drawn          95.0   95.0  0.0  86.3 to 98.3
    all            95.0   95.0  0.0  86.3 to 98.3
    random, 4, 6 or 8 bits
    attacked at  4 bits  6 bits  8 bits  drawn  std  95 %
    -----------  ------  ------  ------  -----  ---  ------------
    clean         100.0   100.0    95.0   97.5  1.5  88.6 to 99.1
    4              95.0    85.0    78.3   85.5  3.3  73.9 to 91.9
    6              95.0    80.0    66.7   81.2  2.9  70.1 to 89.4
    8              96.7    80.0    61.7   79.8  2.8  68.2 to 88.2
    drawn          95.0    83.3    75.0   83.3  2.4  72.0 to 90.7
    all            96.7    80.0    61.7   79.7  3.0  68.2 to 88.2
"""

import sys

import numpy as np
import torch
from torch import Tensor, nn

import qtk
from qtk.robust import Transfer, precision_transfer

BUDGET = 8 / 255
NORMALIZE = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
Labelled = tuple[Tensor, Tensor]  # pixels [N, 3, H, W] in [0, 1], labels [N]


class Block(nn.Module):
    """Two 3 x 3 convolutions, each after its norm (He et al. 2016, arXiv 1603.05027)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        changes = stride != 1 or inputs != outputs
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(x))
        short = x if self.shortcut is None else self.shortcut(y)
        return self.conv2(torch.relu(self.norm2(self.conv1(y)))) + short


class PreActResNet(nn.Module):
    """Three stages of `width`, twice and four times that."""

    def __init__(self, classes: int, width: int = 16, blocks: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        stages: list[nn.Module] = []
        channels = width
        for i in range(3 * blocks):
            wanted = width * 2 ** (i // blocks)
            stages.append(Block(channels, wanted, 2 if wanted > channels else 1))
            channels = wanted
        self.stages, self.norm = nn.Sequential(*stages), nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.stages(self.stem(x))))
        return self.head(y.mean((2, 3)))


def squares(n: int = 300) -> tuple[Tensor, Tensor]:
    """Noise with a square of one of three colours."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(n, 3, 8, 8, generator=generator) * 0.5 + 0.25
    labels = torch.arange(n) % 3
    for i, label in enumerate(labels):
        top, left = torch.randint(0, 5, (2,), generator=generator).tolist()
        pixels[i, label, top : top + 4, left : left + 4] = 0.95
    return (pixels * 255).round() / 255, labels


def attacked(
    train: Labelled, test: Labelled, bits: tuple[int, ...], *, epochs: int, width: int = 16,
    steps: int = 20,
) -> Transfer:  # fmt: skip
    """A network trained under attack on images and their mirror images, and attacked on others."""
    torch.manual_seed(0)
    pixels, labels = train
    net = qtk.random_precision_training(
        PreActResNet(int(labels.max()) + 1, width), torch.cat([pixels, pixels.flip(-1)]),
        labels.repeat(2), bits=bits, epochs=epochs, budget=BUDGET, mean=NORMALIZE[0],
        std=NORMALIZE[1],
    )  # fmt: skip
    return precision_transfer(net, *test, normalize=NORMALIZE, budget=BUDGET, steps=steps)


def main(path: str = "", epochs: str = "10") -> None:
    pixels, labels, width, steps = *squares(), 4, 3
    if path:
        with np.load(path) as file:
            pixels = torch.from_numpy(file["pixels"]).float() / 255
            labels, width, steps = torch.from_numpy(file["labels"]).long(), 16, 20
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = ((pixels[own], labels[own]) for own in order.split(len(labels) * 4 // 5)[:2])
    for name, bits in {"fixed, 8 bits": (8,), "random, 4, 6 or 8 bits": (4, 6, 8)}.items():
        found = attacked(train, test, bits, epochs=int(epochs), width=width, steps=steps)
        print(f"{name}\n{found.table()}")


if __name__ == "__main__":
    main(*sys.argv[1:])
