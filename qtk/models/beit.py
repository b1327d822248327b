"""BEiT: ViT's block with LayerScale; where it has a relative position bias it is not fused."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from qtk.models import Block, vit
from qtk.models._tiny import image


def blocks(model: nn.Module) -> Iterator[Block]:
    config: Any = model.config
    biased = config.use_relative_position_bias or config.use_shared_relative_position_bias
    scales = ("lambda_1", "lambda_2") if config.layer_scale_init_value > 0 else None
    return replace(vit.LAYOUT, scales=scales, fused=not biased).blocks(model, "beit")


tiny = partial(image, "BeitModel", layer_scale_init_value=0.5)
