"""MPNet: BERT's block with a relative position bias in its scores, which no fused block adds."""

from functools import partial

from qtk.models._layout import Layout
from qtk.models._tiny import text

LAYOUT = Layout(
    layers="encoder.layer",
    q="attention.attn.q",
    k="attention.attn.k",
    v="attention.attn.v",
    out="attention.attn.o",
    up="intermediate.dense",
    down="output.dense",
    norm1="attention.LayerNorm",
    norm2="output.LayerNorm",
    pre_norm=False,
    first_norm="embeddings.LayerNorm",
    fused=False,
)

blocks = partial(LAYOUT.blocks, base="mpnet")
tiny = partial(text, "MPNetModel", pad_token_id=1)
