"""A small PreActResNet learns under attack at random precisions, and is attacked by one who knows.

    python -m benchmarks.random_precision [images.npz] [epochs]

`images.npz` holds pixels [N, 3, H, W] uint8 and labels [N]; the last fifth is for testing. Without
it, coloured squares serve, which say that the program runs and nothing about robustness. On 2,000
images of CIFAR-10 ten epochs take some minutes a network on one core. Squares give:

"drawn" attacks at bits drawn anew for each step, as the defender answers; "all" averages its
gradient over all precisions, and is what a claim of robustness has to survive.

fixed, 8 bits
attacked at  8 bits  drawn  std  95 %
-----------  ------  -----  ---  ------------
clean          66.7   66.7  0.0  54.1 to 77.3
8              66.7   66.7  0.0  54.1 to 77.3
drawn          66.7   66.7  0.0  54.1 to 77.3
all            66.7   66.7  0.0  54.1 to 77.3
random, 4 to 8 bits
attacked at  4 bits  6 bits  8 bits  drawn  std  95 %
-----------  ------  ------  ------  -----  ---  ------------
clean          66.7    66.7    51.7   61.5  2.4  49.0 to 72.9
4              66.7    53.3    40.0   52.8  2.5  40.9 to 65.4
6              66.7    50.0    35.0   50.0  2.5  37.7 to 62.3
8              66.7    48.3    33.3   49.0  2.8  36.2 to 60.7
drawn          66.7    51.7    36.7   51.3  2.6  39.3 to 63.8
all            66.7    48.3    33.3   48.3  2.6  36.2 to 60.7
"""

import sys

import numpy as np
import torch
from torch import Tensor, nn

import qtk
from qtk.robust import Transfer, precision_transfer

BUDGET = 8 / 255
NORMALIZE = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


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
        for stage in range(3):
            for block in range(blocks):
                wanted = width * 2**stage
                stages.append(Block(channels, wanted, 2 if stage and not block else 1))
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


def compare(
    pixels: Tensor, labels: Tensor, *, epochs: int, width: int, steps: int = 20, tested: int = 500,
    choices: dict[str, tuple[int, ...]] | None = None,
) -> dict[str, Transfer]:  # fmt: skip
    """Networks trained under attack at fixed and at random bits, the last fifth of the images for
    testing."""
    cut = len(pixels) * 4 // 5
    test = slice(cut, cut + tested)
    found = {}
    for name, bits in (choices or {}).items():
        torch.manual_seed(0)
        net = qtk.random_precision_training(
            PreActResNet(int(labels.max()) + 1, width), pixels[:cut], labels[:cut], bits=bits,
            epochs=epochs, budget=BUDGET, mean=NORMALIZE[0], std=NORMALIZE[1],
        )  # fmt: skip
        found[name] = precision_transfer(
            net, pixels[test], labels[test], normalize=NORMALIZE, budget=BUDGET, steps=steps
        )
    return found


def main(path: str | None = None, epochs: int = 10) -> dict[str, Transfer]:
    """Prints a matrix a network, attacks from above to below."""
    if path is None:
        pixels, labels, width = *squares(), 4
    else:
        with np.load(path) as file:
            pixels = torch.from_numpy(file["pixels"]).float() / 255
            labels, width = torch.from_numpy(file["labels"]).long(), 16
    choices = {"fixed, 8 bits": (8,), "random, 4 to 8 bits": (4, 6, 8)}
    steps = 3 if path is None else 20
    found = compare(pixels, labels, epochs=epochs, width=width, steps=steps, choices=choices)
    for name, transfer in found.items():
        print(f"{name}\n{transfer.table()}")
    return found


if __name__ == "__main__":
    given = sys.argv[1:]
    main(given[0] if given else None, int(given[1]) if len(given) > 1 else 10)
