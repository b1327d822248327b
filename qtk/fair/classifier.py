"""A small BERT that reads rows, and the training of any classifier of rows."""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification

from qtk.fair.rows import Columns

Model = TypeVar("Model", bound=nn.Module)
BATCH = 128


def bert(columns: Columns, seed: int = 0, labels: int = 2) -> BertForSequenceClassification:
    """Untrained: 2 layers, width 64, 4 heads, 128 in between."""
    sizes: dict[str, Any] = {
        "vocab_size": columns.vocabulary, "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "intermediate_size": 128, "num_labels": labels,
        "max_position_embeddings": len(columns.names) + 1, "pad_token_id": None,
    }  # fmt: skip
    config = BertConfig(**sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BertForSequenceClassification(config)


def train(
    model: Model, rows: Tensor, labels: Tensor, *, epochs: int = 5, lr: float = 1e-3, seed: int = 0
) -> Model:
    """Teaches a classifier rows [N, T] and labels [N], in place: AdamW, batches of 128.

    The learning rate falls to zero along a cosine; the global random state stays as it is.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    steps = epochs * -(-len(rows) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    model.train()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        for _ in range(epochs):
            for chosen in torch.randperm(len(rows), generator=generator).split(BATCH):
                optimizer.zero_grad()
                logits = model(input_ids=rows[chosen]).logits
                F.cross_entropy(logits, labels[chosen]).backward()
                optimizer.step()
                schedule.step()
    return model.eval()
