"""DeBERTa v2 and v3: BERT's block with disentangled attention, which no fused block computes.

Its q and k project the relative positions too; they are quantized on the grids of the tokens.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from qtk.errors import ModelError
from qtk.models import Block, bert
from qtk.models._tiny import text

LAYOUT = replace(
    bert.LAYOUT,
    q="attention.self.query_proj",
    k="attention.self.key_proj",
    v="attention.self.value_proj",
    fused=False,
)


def blocks(model: nn.Module) -> Iterator[Block]:
    config: Any = model.config
    if getattr(config, "conv_kernel_size", 0) > 0:
        raise ModelError(
            f"{type(model).__name__}: a DeBERTa with a convolution after its first block "
            "(conv_kernel_size) is not supported; DeBERTa v3 has none"
        )
    return LAYOUT.blocks(model, "deberta")


tiny = partial(
    text, "DebertaV2Model", relative_attention=True, pos_att_type=["p2c", "c2p"],
    position_buckets=8, norm_rel_ebd="layer_norm", share_att_key=True,
)  # fmt: skip
