"""Metal objects that hide a weapon from the float network: do they hide it from the quantized one?

python xray.py page.html      half a minute, a small network that has seen few bags

"""

import sys

import torch
from torch import nn

import qtk
from qtk.physical import scene


def taught(bags: scene.Scenes, epochs: int = 10) -> nn.Module:
    """Five classes: nothing, or one of four items."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in ((3, 16), (16, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(64, 5))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(epochs):
        for chosen in torch.randperm(len(bags.labels)).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(bags.images[chosen]), bags.labels[chosen]).backward()
            optimizer.step()
    return model.eval()


def main(page: str | None = None) -> qtk.XRay:
    bags = scene.draw(500, seed=0)
    model = taught(bags)
    qmodel = qtk.quantize(model, w=4, a=8, calib=[bags.images[:128]], progress=False)
    craft, test = scene.draw(32, seed=1), scene.draw(100, seed=2)
    result = qtk.xray(model, qmodel, craft, test, progress=False)
    print(result.table())
    if page:
        qtk.trust_page(result, page)  # with pictures: scenes, thickness, attacked scenes
    return result


if __name__ == "__main__":
    main(*sys.argv[1:])
