"""DistilBERT: post-norm, GELU, half of BERT's layers."""

from functools import partial

from qtk.models._layout import Layout
from qtk.models._tiny import text

LAYOUT = Layout(
    layers="transformer.layer",
    q="attention.q_lin",
    k="attention.k_lin",
    v="attention.v_lin",
    out="attention.out_lin",
    up="ffn.lin1",
    down="ffn.lin2",
    norm1="sa_layer_norm",
    norm2="output_layer_norm",
    pre_norm=False,
    first_norm="embeddings.LayerNorm",
    activation="activation",
)

blocks = partial(LAYOUT.blocks, base="distilbert")
tiny = partial(text, "DistilBertModel", hidden_dim=64)
