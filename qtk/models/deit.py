"""DeiT: ViT's block, with a distillation token in the embeddings."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from qtk.models import Block, Stream, vit


def blocks(model: nn.Module) -> Iterator[Block]:
    return vit.blocks(model, base="deit")


def stream(model: nn.Module) -> Stream | None:
    heads = ("classifier", "cls_classifier", "distillation_classifier")
    return vit.stream(model, "deit", heads)


def tiny() -> tuple[nn.Module, dict[str, Any]]:
    """A random model of this family that runs in milliseconds, and one batch for it."""
    import torch
    from transformers import DeiTConfig, DeiTForImageClassification

    sizes: dict[str, Any] = {
        "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2,
        "intermediate_size": 64, "image_size": 16, "patch_size": 4, "num_labels": 5,
    }  # fmt: skip
    model = DeiTForImageClassification(DeiTConfig(**sizes)).eval()
    return model, {"pixel_values": torch.randn(2, 3, 16, 16)}
