"""BERT: post-norm, GELU."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn

from qtk.models import Block
from qtk.models._layout import Layout
from qtk.models._tiny import text

LAYOUT = Layout(
    layers="encoder.layer",
    q="attention.self.query",
    k="attention.self.key",
    v="attention.self.value",
    out="attention.output.dense",
    up="intermediate.dense",
    down="output.dense",
    norm1="attention.output.LayerNorm",
    norm2="output.LayerNorm",
    pre_norm=False,
    first_norm="embeddings.LayerNorm",
)


def blocks(model: nn.Module, base: str = "bert") -> Iterator[Block]:
    config: Any = model.config
    return LAYOUT.blocks(model, base, causal=bool(getattr(config, "is_decoder", False)))


tiny = partial(text, "BertModel")
