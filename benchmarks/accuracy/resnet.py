"""ResNet-18 for CIFAR-10: trained on one core, quantized, rounded by EFRAP, and raced.

    python -m benchmarks.accuracy.resnet train WEIGHTS [width]   goes on from such a file
    python -m benchmarks.accuracy.resnet accuracy WEIGHTS
    python -m benchmarks.accuracy.resnet minutes
    python -m benchmarks.accuracy.resnet speed

Training is short, as a core allows, and most of it sees images of half the size: what counts is
the difference to the quantized networks. `accuracy` adds rows to resnet.json, `minutes` what EFRAP
takes at full width; `speed` writes resnet_speed.json. Neither of these two needs trained weights.
"""

import copy
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qtk
from benchmarks import data
from benchmarks.result import Row, read, result, write
from qtk.timing import race

TRAIN, TEST, CALIB = 25_000, 2_000, 256
SIDES = (16, 16, 16, 32)  # of the images, an epoch each
WIDTH = 64  # channels of the first stage
BATCH, RATE, DECAY = 128, 0.2, 5e-4
CASES: dict[str, dict[str, Any]] = {
    "W8A8": {"w": 8, "a": 8},
    "W4A8": {"w": 4, "a": 8},
    **{
        f"W4A16, {rounding}": {"w": 4, "a": 16, "method": "none", "rounding": rounding}
        for rounding in ("nearest", "adaround", "flipped")
    },
}
BATCHES = (1, 16, 64)  # images, raced


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut (He et al. 2015, arXiv 1512.03385)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet18(nn.Module):
    """With a 3 x 3 stem and no pooling after it, as usual for images of 32 pixels."""

    def __init__(self, width: int = WIDTH, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        blocks: list[nn.Module] = []
        channels = width
        for stage in range(4):
            for stride in (2 if stage else 1, 1):
                blocks.append(Block(channels, width * 2**stage, stride))
                channels = width * 2**stage
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks(torch.relu(self.norm(self.stem(x))))
        return self.head(y.mean((2, 3)))


def train(weights: str, width: int | str = WIDTH) -> None:
    """By SGD under one cycle of the rate, in bfloat16; a file is written after every epoch."""
    path = Path(weights)
    pixels, labels = data.cifar10("train", TRAIN)
    torch.manual_seed(0)
    width = int(width)
    net = ResNet18(width).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(net.parameters(), RATE, 0.9, weight_decay=DECAY, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=len(SIDES) * (TRAIN // BATCH)
    )
    parts: dict[str, Any] = {"net": net, "optimizer": optimizer, "schedule": schedule}
    done = 0
    if path.exists():
        held = torch.load(path, weights_only=True)
        done = held["epochs"]
        for name, part in parts.items():
            part.load_state_dict(held[name])
    for epoch in range(done, len(SIDES)):
        generator = torch.Generator().manual_seed(epoch)
        order = torch.randperm(TRAIN, generator=generator)[: TRAIN // BATCH * BATCH]
        for i, chosen in enumerate(order.view(-1, BATCH)):
            x = augmented(pixels[chosen], SIDES[epoch], generator)
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                logits = net(x)
            loss = F.cross_entropy(logits.float(), labels[chosen], label_smoothing=0.05)
            loss.backward()
            optimizer.step()
            schedule.step()
            if i % 50 == 0:
                print(epoch, i, f"{loss.item():.3f}", flush=True)
        held = {name: part.state_dict() for name, part in parts.items()}
        torch.save({**held, "epochs": epoch + 1, "width": width}, path)


def augmented(x: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """[B, 3, side, side], channels last: cut with up to an eighth of padding, and mirrored."""
    if side != x.shape[-1]:
        x = F.avg_pool2d(x, x.shape[-1] // side)
    pad = side // 8
    padded = F.pad(x, (pad,) * 4)
    top, left = torch.randint(0, 2 * pad + 1, (2,), generator=generator).tolist()
    x = padded[..., top : top + side, left : left + side]
    mirrored = torch.rand(len(x), generator=generator) < 0.5
    x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
    return x.contiguous(memory_format=torch.channels_last)


def loaded(path: str) -> ResNet18:
    held = torch.load(path, weights_only=True)
    net = ResNet18(held["width"])
    net.load_state_dict(held["net"])
    return net.eval().requires_grad_(False)


@torch.no_grad()
def right(net: nn.Module) -> Tensor:
    """Which of the test images are answered rightly."""
    pixels, labels = data.cifar10("test", TEST)
    found = [
        net(x).argmax(1) == y for x, y in zip(pixels.split(100), labels.split(100), strict=True)
    ]
    return torch.cat(found)


def accuracy(path: str) -> None:
    """Of the float network and of every case, after quantizing."""
    net = loaded(path)
    base, width = right(net), str(net.stem.out_channels)
    _keep([width, "float32", f"{share(base):.2f}", "", ""])
    for name, options in CASES.items():
        qnet, minutes = quantized(net, options)
        found = right(qnet)
        lost = (found.float() - base.float()) * 100
        error = float(lost.std() / len(lost) ** 0.5)
        change = f"{float(lost.mean()):+.2f} +- {error:.2f}"
        _keep([width, name, f"{share(found):.2f}", change, f"{minutes:.1f}"])


def minutes() -> None:
    """What EFRAP takes for the whole width; the weights do not matter."""
    torch.manual_seed(0)
    net = ResNet18().eval().requires_grad_(False)
    _, found = quantized(net, CASES["W4A16, flipped"])
    _keep([str(WIDTH), "W4A16, flipped, untrained", "", "", f"{found:.1f}"])


def quantized(net: nn.Module, options: dict[str, Any]) -> tuple[nn.Module, float]:
    """The quantized network and minutes of processor time."""
    calib, start = [*data.cifar10("train", CALIB, seed=1)[0].split(64)], time.process_time()
    qnet = qtk.quantize(net, calib=calib, progress=False, **options)
    return qnet, (time.process_time() - start) / 60


def _keep(row: Row) -> None:
    """In the place of the row of the same network, or as a new one."""
    print(row, flush=True)
    old = read("resnet")
    rows = {tuple(kept[:2]): kept for kept in [*old.get("rows", ()), row]}
    write("resnet", result(
        f"ResNet-18 for CIFAR-10 (JPEG), {TEST:,} test images",
        ["width", "network", "top-1 %", "to float", "minutes of a core"], [*rows.values()],
        f"{WIDTH} channels in the first stage are the usual ones, 11 million parameters. Trained "
        f"for {len(SIDES)} epochs on {TRAIN:,} images; {CALIB} of the training split calibrate. "
        "+- is the standard error of the difference on the same images. Minutes: quantizing, by "
        "one thread",
        kept=old,
    ))  # fmt: skip


def share(found: Tensor) -> float:
    return 100 * float(found.float().mean())


def speed() -> None:
    """Of a float network as it is, channels last and compiled, and of its W8A8."""
    net: Any = ResNet18().eval().requires_grad_(False)
    qnet, _ = quantized(net, {"w": 8, "a": 8, "preset": "fast"})
    last = copy.deepcopy(net).to(memory_format=torch.channels_last)
    nets = {"float32": net, "channels last": last, "compiled": torch.compile(last), "W8A8": qnet}
    rows = []
    for B in BATCHES:
        images = data.cifar10("test", TEST)[0][:B]
        x = images.contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            nets["compiled"](x)
        calls = {name: partial(nets[name], images if name == "float32" else x) for name in nets}
        seconds = race(calls, rounds=7, warmup=1, limit=4)
        best = min(s for name, s in seconds.items() if name != "W8A8")
        rows.append([
            str(B), *(f"{1000 * s:.1f}" for s in seconds.values()), f"{best / seconds['W8A8']:.2f}"
        ])  # fmt: skip
        print(rows[-1], flush=True)
    write("resnet_speed", result(
        "ResNet-18, images of 32 pixels: milliseconds a batch",
        ["images", *nets, "W8A8 against the best float"], rows,
        "Medians, raced in one process. Compiled: torch.compile of the channels-last network; W8A8 "
        "reads channels last, too. Untrained: the weights do not matter",
    ))  # fmt: skip


PARTS: dict[str, Callable[..., None]] = {
    "train": train, "accuracy": accuracy, "minutes": minutes, "speed": speed,
}  # fmt: skip

if __name__ == "__main__":
    part, *given = sys.argv[1:]
    PARTS[part](*given)
