"""BERT and RoBERTa-like encoders: post-norm, GELU."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from qtk.models import Block, fused_activation, prefix


def blocks(model: nn.Module, base: str = "bert") -> Iterator[Block]:
    config: Any = model.config
    root = prefix(model, base)
    layers = f"{root}encoder.layer"
    for i in range(config.num_hidden_layers):
        before = f"{layers}.{i - 1}.output" if i else f"{root}embeddings"
        yield Block(
            name=f"{layers}.{i}",
            q="attention.self.query",
            k="attention.self.key",
            v="attention.self.value",
            out="attention.output.dense",
            fc1="intermediate.dense",
            fc2="output.dense",
            norm1="attention.output.LayerNorm",
            norm2="output.LayerNorm",
            input_norm=f"{before}.LayerNorm",
            pre_norm=False,
            heads=config.num_attention_heads,
            activation=fused_activation(config.hidden_act),
            causal=bool(config.is_decoder),
        )


def tiny() -> tuple[nn.Module, dict[str, Any]]:
    """A random model of this family that runs in milliseconds, and one batch for it."""
    import torch
    from transformers import BertConfig, BertModel

    config = BertConfig(
        num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=64,
        vocab_size=99, max_position_embeddings=64,
    )  # fmt: skip
    ids = torch.randint(3, 99, (2, 8))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return BertModel(config).eval(), {"input_ids": ids, "attention_mask": mask}
