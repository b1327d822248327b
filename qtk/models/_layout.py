"""A stack of equal blocks as a table of names: what most family files are."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from qtk.models import Anatomy, Attention, Block, Mlp, fused_activation


@dataclass(frozen=True)
class Layout:
    """Where the parts of a family's blocks are. Names are relative to the block, unless said.

    Attributes:
        layers: the list of blocks, relative to the encoder inside a model with a head.
        q, k, v, out: attention's linears.
        up, down: the MLP's linears.
        norm1, norm2: the LayerNorms, before or after attention and MLP.
        pre_norm: whether they stand before.
        first_norm: of post-norm families: what the first block reads, relative to the encoder.
        activation: the field of the config that names it.
        scales: LayerScale's two vectors.
        gate: a third linear of the MLP, whose SiLU multiplies what `up` gives.
        fused: whether a block computes nothing but what the anatomy says.
    """

    layers: str
    q: str
    k: str
    v: str
    out: str
    up: str
    down: str
    norm1: str
    norm2: str
    pre_norm: bool
    first_norm: str | None = None
    activation: str = "hidden_act"
    scales: tuple[str, str] | None = None
    gate: str | None = None
    fused: bool = True

    def blocks(self, model: nn.Module, base: str, causal: bool = False) -> Iterator[Block]:
        """The blocks of a model.

        Args:
            base: the encoder's name inside a model with a head.
            causal: whether a token sees only those before it.
        """
        config: Any = model.config
        root = prefix(model, base)
        anatomy = self.anatomy(config, causal)
        for i in range(config.num_hidden_layers):
            name = f"{root}{self.layers}.{i}"
            if self.pre_norm:
                norm: str | None = f"{name}.{self.norm1}"
            elif i:
                norm = f"{root}{self.layers}.{i - 1}.{self.norm2}"
            else:
                norm = self.first_norm and f"{root}{self.first_norm}"
            block = Block.of(name, anatomy, norm)
            yield block if self.fused else replace(block, anatomy=None)

    def anatomy(self, config: Any, causal: bool = False) -> Anatomy:
        """What a block of such a config computes."""
        attention = Attention(self.q, self.k, self.v, self.out, config.num_attention_heads, causal)
        if self.gate is None:
            mlp = Mlp((self.up,), self.down, fused_activation(getattr(config, self.activation)))
        else:
            mlp = Mlp((self.gate, self.up), self.down, "silu", gated=True)
        return Anatomy(attention, mlp, self.norm1, self.norm2, self.pre_norm, self.scales)


def prefix(model: nn.Module, base: str) -> str:
    """ "bert." when the encoder sits inside a model with a head, "" when it is the model."""
    return f"{base}." if base and hasattr(model, base) else ""
