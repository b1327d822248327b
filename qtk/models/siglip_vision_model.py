"""SigLIP's image encoder: pre-norm, GELU by tanh."""

from functools import partial

from qtk.models._layout import Layout
from qtk.models._tiny import image

LAYOUT = Layout(
    layers="encoder.layers",
    q="self_attn.q_proj",
    k="self_attn.k_proj",
    v="self_attn.v_proj",
    out="self_attn.out_proj",
    up="mlp.fc1",
    down="mlp.fc2",
    norm1="layer_norm1",
    norm2="layer_norm2",
    pre_norm=True,
)

blocks = partial(LAYOUT.blocks, base="vision_model")
tiny = partial(image, "SiglipVisionModel")
