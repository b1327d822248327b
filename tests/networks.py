"""Small networks of convolutions that are no models of transformers, and images for them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Residual(nn.Module):
    """Two convolutions beside a shortcut; registered in another order than they run."""

    def __init__(self, C: int, N: int, stride: int) -> None:
        super().__init__()
        self.bn2 = nn.BatchNorm2d(N)
        self.conv2 = nn.Conv2d(N, N, 3, padding=1, bias=False)
        self.conv1 = nn.Conv2d(C, N, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(N)
        self.shortcut = nn.Conv2d(C, N, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class PreActivation(nn.Module):
    """Norms before convolutions, of which only the second follows one."""

    def __init__(self, C: int) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(C), nn.BatchNorm2d(C)
        self.conv1 = nn.Conv2d(C, C, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(C, C, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.bn1(x)))
        return x + self.conv2(F.relu(self.bn2(y)))


class Net(nn.Module):
    """A stem, a residual and a pre-activated block, a head; 16 by 16 images of 3 channels."""

    def __init__(self, groups: int = 1, classes: int = 5) -> None:
        super().__init__()
        self.head = nn.Linear(128, classes)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.ModuleList([Residual(8, 16, 2), PreActivation(16)])
        self.grouped = nn.Conv2d(16, 8, 3, padding=1, groups=groups)
        self.unused = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = F.max_pool2d(F.relu(self.grouped(x)), 2)
        return self.head(x.view(x.size(0), -1))


def images(n: int = 16, batches: int = 2) -> list[Tensor]:
    """Tensors [n, 3, 16, 16]."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(n, 3, 16, 16, generator=generator) + 0.3 for _ in range(batches)]


def settled(net: nn.Module, run: Callable[[Tensor], object] | None = None) -> nn.Module:
    """The network with BatchNorms that have seen images, and that scale and shift."""
    torch.manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    net.train()
    with torch.no_grad():
        for x in images(32, 20):
            (run or net)(x)
    return net.eval()
