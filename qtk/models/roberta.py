"""RoBERTa: BERT's block under another name."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from qtk.models import Block, bert


def blocks(model: nn.Module) -> Iterator[Block]:
    return bert.blocks(model, base="roberta")


def tiny() -> tuple[nn.Module, dict[str, Any]]:
    """A random model of this family that runs in milliseconds, and one batch for it."""
    import torch
    from transformers import RobertaConfig, RobertaModel

    config = RobertaConfig(
        num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=64,
        vocab_size=99, max_position_embeddings=64,
    )  # fmt: skip
    ids = torch.randint(3, 99, (2, 8))
    return RobertaModel(config).eval(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
