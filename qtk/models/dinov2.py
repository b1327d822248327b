"""DINOv2: ViT's block with LayerScale; the giant's MLP is gated by SiLU."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from qtk.models import Block, vit
from qtk.models._tiny import image

LAYOUT = replace(
    vit.LAYOUT,
    layers="encoder.layer",
    out="attention.o_proj",
    norm1="norm1",
    norm2="norm2",
    scales=("layer_scale1.lambda1", "layer_scale2.lambda1"),
)


def blocks(model: nn.Module) -> Iterator[Block]:
    config: Any = model.config
    layout = LAYOUT
    if config.use_swiglu_ffn:
        layout = replace(LAYOUT, gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj")
    return layout.blocks(model, "dinov2")


tiny = partial(image, "Dinov2Model", layerscale_value=0.5, mlp_ratio=2)
