"""Small networks that say which prohibited item a bag holds, and their training.

A few convolutions learn it in two minutes of one core; a ViT of that size needs many times as long.
"""

from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

from qtk.fidelity.compare import class_logits
from qtk.physical.scene import NAMES, SIZE, Scenes
from qtk.pipeline.progress import progress_bar

BATCH = 128
CHANNELS = (32, 64, 96, 96)
Model = TypeVar("Model", bound=nn.Module)


def cnn(channels: tuple[int, ...] = CHANNELS, seed: int = 0) -> nn.Sequential:
    """Untrained: convolutions of stride 2 with BatchNorms; the global random state stays."""
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for before, after in zip((3, *channels), channels, strict=False):
            side = 3 if layers else 5
            layers += [nn.Conv2d(before, after, side, 2, side // 2), nn.BatchNorm2d(after)]
            layers.append(nn.ReLU())
        head = nn.Linear(channels[-1], len(NAMES))
        return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), head)


def vit(
    patch: int = 8, width: int = 96, layers: int = 4, seed: int = 0
) -> ViTForImageClassification:
    """Untrained, for bags of 64 pixels; the global random state stays as it is."""
    sizes: dict[str, Any] = {
        "image_size": SIZE, "patch_size": patch, "hidden_size": width, "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // 32), "intermediate_size": 2 * width,
        "id2label": dict(enumerate(NAMES)), "label2id": {n: i for i, n in enumerate(NAMES)},
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ViTForImageClassification(ViTConfig(**sizes))


def train(
    model: Model, scenes: Scenes, *, epochs: int = 12, lr: float = 3e-3, seed: int = 0,
    progress: bool = True,
) -> Model:  # fmt: skip
    """Teaches it, in place: AdamW along one cycle, batches of 128, bags mirrored by chance.

    Args:
        lr: at most; 1e-3 is better for a ViT.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.05)
    steps = epochs * -(-len(scenes.labels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    model.train()
    with torch.enable_grad(), progress_bar(progress) as bar:
        for done in range(epochs):
            bar.show("bags", done, epochs)
            order = torch.randperm(len(scenes.labels), generator=generator)
            for chosen in order.split(BATCH):
                images = scenes.images[chosen]
                for axis in (-1, -2):
                    mirrored = torch.rand(len(chosen), 1, 1, 1, generator=generator) < 0.5
                    images = torch.where(mirrored, images.flip(axis), images)
                logits = class_logits(model, model(images), "a classifier of bags is taught")
                optimizer.zero_grad()
                F.cross_entropy(logits, scenes.labels[chosen]).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
    return model.eval()
