"""ELECTRA: BERT's block; its embeddings may be narrower than the blocks, and are then projected."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from qtk.models import Block, bert
from qtk.models._tiny import text


def blocks(model: nn.Module) -> Iterator[Block]:
    config: Any = model.config
    projected = config.embedding_size != config.hidden_size
    layout = replace(bert.LAYOUT, first_norm=None) if projected else bert.LAYOUT
    return layout.blocks(model, "electra", causal=bool(config.is_decoder))


tiny = partial(text, "ElectraModel", embedding_size=16)
