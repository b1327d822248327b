"""ViT: pre-norm, GELU, no mask."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from qtk.models import Block, Stream, fused_activation, prefix


def blocks(model: nn.Module, base: str = "vit") -> Iterator[Block]:
    config: Any = model.config
    layers = f"{prefix(model, base)}layers"
    for i in range(config.num_hidden_layers):
        name = f"{layers}.{i}"
        yield Block(
            name=name,
            q="attention.q_proj",
            k="attention.k_proj",
            v="attention.v_proj",
            out="attention.o_proj",
            fc1="mlp.fc1",
            fc2="mlp.fc2",
            norm1="layernorm_before",
            norm2="layernorm_after",
            input_norm=f"{name}.layernorm_before",
            pre_norm=True,
            heads=config.num_attention_heads,
            activation=fused_activation(config.hidden_act),
        )


def stream(
    model: nn.Module, base: str = "vit", heads: tuple[str, ...] = ("classifier",)
) -> Stream | None:
    """Of a classifier: the bare model's output is the stream itself."""
    found = tuple(n for n in heads if isinstance(getattr(model, n, None), nn.Linear))
    if not hasattr(model, base) or not found:
        return None
    patches = f"{base}.embeddings.patch_embeddings.projection"
    tokens = ("cls_token", "distillation_token", "position_embeddings")
    embeddings = {f"{base}.embeddings.{n}": 2 for n in tokens}
    embeddings |= {f"{patches}.weight": 0, f"{patches}.bias": 0}
    names = dict(model.named_parameters())
    present = {n: axis for n, axis in embeddings.items() if n in names}
    return Stream(present, f"{base}.layernorm", found)


def tiny() -> tuple[nn.Module, dict[str, Any]]:
    """A random model of this family that runs in milliseconds, and one batch for it."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    sizes: dict[str, Any] = {
        "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2,
        "intermediate_size": 64, "image_size": 16, "patch_size": 4, "num_labels": 5,
    }  # fmt: skip
    model = ViTForImageClassification(ViTConfig(**sizes)).eval()
    return model, {"pixel_values": torch.randn(2, 3, 16, 16)}
