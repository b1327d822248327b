"""CLIP's image encoder: SigLIP's block with a quick GELU."""

from functools import partial

from qtk.models import siglip_vision_model
from qtk.models._tiny import image

blocks = partial(siglip_vision_model.LAYOUT.blocks, base="vision_model")
tiny = partial(image, "CLIPVisionModel")
