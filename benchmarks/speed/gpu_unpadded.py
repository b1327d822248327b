"""What users of BERT run today: float16, FlashAttention-2, and padding left out.

The encoder of transformers computes on the tokens of a batch one behind the other, [1, N, H], as
with the package flash-attn; attention is the FlashAttention-2 of PyTorch itself, which knows where
sentences end. Tokens are gathered behind the embeddings and scattered behind the last block.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "qtk_benchmark_packed"


class Unpadded(nn.Module):
    """A BERT whose encoder sees no padding, [B, T] ids to [B, T, H].

    Args:
        model: a BertModel; its attention is replaced.
        attention_mask: [B, T], of every batch that will come: where its ones are is worked out
            once, as a data loader would.
    """

    def __init__(self, model: Any, attention_mask: Tensor) -> None:
        super().__init__()
        lengths = attention_mask.sum(1, dtype=torch.int32)
        self.rows = attention_mask.flatten().nonzero()[:, 0]
        self.starts = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        self.longest = int(lengths.max())
        self.model = model
        ALL_ATTENTION_FUNCTIONS.register(NAME, self.attend)
        model.config._attn_implementation = NAME

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.model.embeddings(input_ids=input_ids)
        packed = x.flatten(0, 1)[self.rows][None]
        y = self.model.encoder(packed).last_hidden_state[0]
        return torch.zeros_like(x).flatten(0, 1).index_copy_(0, self.rows, y).view_as(x)

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **_: Any
    ) -> tuple[Tensor, None]:
        """[1, heads, N, D] to [1, N, heads, D]."""
        return self.varlen(*(x[0].transpose(0, 1) for x in (q, k, v)))[None], None

    def varlen(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[N, heads, D], sentences from `starts` on."""
        starts, most = self.starts, self.longest
        return torch.ops.aten._flash_attention_forward(
            q, k, v, starts, starts, most, most, 0.0, False, False
        )[0]
