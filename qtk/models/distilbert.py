"""DistilBERT: post-norm, GELU, half of BERT's layers."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from qtk.models import Block, fused_activation, prefix


def blocks(model: nn.Module) -> Iterator[Block]:
    config: Any = model.config
    root = prefix(model, "distilbert")
    layers = f"{root}transformer.layer"
    for i in range(config.n_layers):
        before = f"{layers}.{i - 1}.output_layer_norm" if i else f"{root}embeddings.LayerNorm"
        yield Block(
            name=f"{layers}.{i}",
            q="attention.q_lin",
            k="attention.k_lin",
            v="attention.v_lin",
            out="attention.out_lin",
            fc1="ffn.lin1",
            fc2="ffn.lin2",
            norm1="sa_layer_norm",
            norm2="output_layer_norm",
            input_norm=before,
            pre_norm=False,
            heads=config.n_heads,
            activation=fused_activation(config.activation),
        )


def tiny() -> tuple[nn.Module, dict[str, Any]]:
    """A random model of this family that runs in milliseconds, and one batch for it."""
    import torch
    from transformers import DistilBertConfig, DistilBertModel

    config = DistilBertConfig(
        n_layers=2, dim=32, n_heads=2, hidden_dim=64, vocab_size=99, max_position_embeddings=64
    )
    ids = torch.randint(3, 99, (2, 8))
    return DistilBertModel(config).eval(), {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
    }
