"""OPT: causal, ReLU, pre-norm (but opt-350m is post-norm and projects its embeddings)."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from qtk.models import Block, Stream, fused_activation, prefix


def blocks(model: nn.Module) -> Iterator[Block]:
    config: Any = model.config
    layers = f"{prefix(model, 'model')}decoder.layers"
    pre_norm = config.do_layer_norm_before
    for i in range(config.num_hidden_layers):
        name = f"{layers}.{i}"
        input_norm: str | None
        if pre_norm:
            input_norm = f"{name}.self_attn_layer_norm"
        else:
            input_norm = f"{layers}.{i - 1}.final_layer_norm" if i else None
        yield Block(
            name=name,
            q="self_attn.q_proj",
            k="self_attn.k_proj",
            v="self_attn.v_proj",
            out="self_attn.out_proj",
            fc1="fc1",
            fc2="fc2",
            norm1="self_attn_layer_norm",
            norm2="final_layer_norm",
            input_norm=input_norm,
            pre_norm=pre_norm,
            heads=config.num_attention_heads,
            activation=fused_activation(config.activation_function),
            causal=True,
        )


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


def tiny() -> tuple[nn.Module, dict[str, Any]]:
    """A random model of this family that runs in milliseconds, and one batch for it."""
    import torch
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        num_hidden_layers=2, hidden_size=32, num_attention_heads=2, ffn_dim=64, vocab_size=99,
        word_embed_proj_dim=32, max_position_embeddings=64,
    )  # fmt: skip
    ids = torch.randint(3, 99, (2, 8))
    return OPTForCausalLM(config).eval(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
