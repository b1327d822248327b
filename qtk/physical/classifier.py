"""A small ViT that says which prohibited item a bag holds, and its training."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

from qtk.physical.scene import NAMES, SIZE, Scenes
from qtk.pipeline.progress import progress_bar

BATCH = 128


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
    model: ViTForImageClassification, scenes: Scenes, *, epochs: int = 12, lr: float = 1e-3,
    seed: int = 0, progress: bool = True,
) -> ViTForImageClassification:  # fmt: skip
    """Teaches it, in place: AdamW along one cycle, batches of 128, half of the bags mirrored."""
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
                mirrored = torch.rand(len(chosen), generator=generator) < 0.5
                images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
                optimizer.zero_grad()
                F.cross_entropy(model(images).logits, scenes.labels[chosen]).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
    return model.eval()
