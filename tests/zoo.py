"""Tiny random models of every kind that a user may bring, and batches for them."""

from typing import Any

import torch
import transformers

COMMON = {
    "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64,
}  # fmt: skip
BERT = {**COMMON, "vocab_size": 99, "max_position_embeddings": 64}
DISTILBERT = {
    "n_layers": 2, "dim": 32, "n_heads": 2, "hidden_dim": 64, "vocab_size": 99,
    "max_position_embeddings": 64,
}  # fmt: skip
OPT = {
    "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "ffn_dim": 64,
    "vocab_size": 99, "max_position_embeddings": 64, "word_embed_proj_dim": 32,
}  # fmt: skip
OPT_350M = {**OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}
VIT = {**COMMON, "image_size": 16, "patch_size": 4, "num_labels": 5}

ZOO: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{name: (name, "BertConfig", BERT) for name in (
        "BertModel", "BertForMaskedLM", "BertForSequenceClassification",
        "BertForTokenClassification", "BertForQuestionAnswering",
    )},
    "RobertaForSequenceClassification":
        ("RobertaForSequenceClassification", "RobertaConfig", {**BERT, "pad_token_id": 1}),
    "DistilBertModel": ("DistilBertModel", "DistilBertConfig", DISTILBERT),
    "OPTModel": ("OPTModel", "OPTConfig", OPT),
    "OPTForCausalLM": ("OPTForCausalLM", "OPTConfig", OPT),
    "OPT350m": ("OPTForCausalLM", "OPTConfig", OPT_350M),
    "ViTModel": ("ViTModel", "ViTConfig", VIT),
    "ViTForImageClassification": ("ViTForImageClassification", "ViTConfig", VIT),
    "DeiTModel": ("DeiTModel", "DeiTConfig", VIT),
    "DeiTForImageClassification": ("DeiTForImageClassification", "DeiTConfig", VIT),
    "DistilledDeiT": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", VIT),
}  # fmt: skip


def build(
    name: str, dtype: torch.dtype = torch.float32, **changes: Any
) -> tuple[Any, dict[str, Any]]:
    """The model in eval mode and one batch, the second row padded where there are tokens."""
    torch.manual_seed(0)
    cls, config, sizes = ZOO[name]
    config = getattr(transformers, config)(**{**sizes, **changes})
    model = getattr(transformers, cls)(config).eval().to(dtype)
    if cls.startswith(("ViT", "DeiT")):
        return model, {"pixel_values": torch.randn(2, 3, 16, 16, dtype=dtype)}
    ids = torch.randint(3, 99, (2, 8))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return model, {"input_ids": ids, "attention_mask": mask}
