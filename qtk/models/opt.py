"""OPT: causal, ReLU, pre-norm (but opt-350m is post-norm and projects its embeddings)."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from qtk.models import Block, Stream
from qtk.models._layout import Layout
from qtk.models._tiny import text

LAYOUT = Layout(
    layers="decoder.layers",
    q="self_attn.q_proj",
    k="self_attn.k_proj",
    v="self_attn.v_proj",
    out="self_attn.out_proj",
    up="fc1",
    down="fc2",
    norm1="self_attn_layer_norm",
    norm2="final_layer_norm",
    pre_norm=True,
    activation="activation_function",
)


def blocks(model: nn.Module) -> Iterator[Block]:
    config: Any = model.config
    layout = replace(LAYOUT, pre_norm=config.do_layer_norm_before)
    return layout.blocks(model, "model", causal=True)


def stream(model: nn.Module) -> Stream | None:
    """Of the language model alone: OPTModel's output is the stream itself."""
    decoder: Any = getattr(getattr(model, "model", None), "decoder", None)
    norm = getattr(decoder, "final_layer_norm", None)
    if norm is None or decoder.project_in is not None or not hasattr(model, "lm_head"):
        return None
    tables = ("embed_tokens", "embed_positions")
    return Stream(
        {f"model.decoder.{name}.weight": 1 for name in tables},
        "model.decoder.final_layer_norm",
        ("lm_head",),
    )


tiny = partial(text, "OPTForCausalLM", ffn_dim=64, word_embed_proj_dim=32)
