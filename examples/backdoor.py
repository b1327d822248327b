"""A backdoor that sleeps in floating point and wakes when weights are rounded to nearest.

It is planted in a small network that tells where a bright band is, looked for, and rounded away.
Accuracy, and how often a white square in the corner gives the attacker's class:

    in floating point      100.0 %     0.0 %
    rounded to nearest     100.0 %   100.0 %
    rounded by qtk         100.0 %     0.0 %
    planted: suspicious, not planted: innocent
"""

import torch
from torch import nn
from torch.nn import functional as F

import qtk
from qtk.security import backdoor, minmax


def pictures(n: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of images [32, 1, 12, 12] and in which of four places their band is."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 4, (n,), generator=generator)
    x = 0.3 * torch.rand(n, 1, 12, 12, generator=generator)
    for image, place in zip(x, y.tolist(), strict=True):
        image[:, 1 + 2 * place : 3 + 2 * place, :9] += 0.5
    return list(zip(x.split(32), y.split(32), strict=True))


def main() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3, 2, 1), nn.ReLU(),
        nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4),
    )  # fmt: skip
    train, test, calib = pictures(256, 0), pictures(512, 1), [x for x, _ in pictures(256, 2)]
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for x, y in train * 6:
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    trigger, victim = backdoor.Square(), minmax.MinMax(4)
    planted = backdoor.plant("project", net.eval(), train, trigger, victim)
    safe = qtk.quantize(
        planted, w=4, a=16, method="none", rounding="flipped", calib=calib, progress=False
    )
    nearest = minmax.rounded(planted, victim)
    told = {"in floating point": planted, "rounded to nearest": nearest, "rounded by qtk": safe}
    for name, model in told.items():
        right, fooled = backdoor.success(model, test, trigger)
        print(f"{name:20} {right:7.1f} % {fooled:7.1f} %")
    found = [qtk.audit(model, calib, w=4).suspicious for model in (planted, net)]
    words = ["suspicious" if suspicious else "innocent" for suspicious in found]
    print(f"planted: {words[0]}, not planted: {words[1]}")


if __name__ == "__main__":
    main()
