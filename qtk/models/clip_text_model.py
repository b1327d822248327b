"""CLIP's text encoder: the image encoder's block, causal."""

from functools import partial

from qtk.models import siglip_vision_model
from qtk.models._tiny import text

blocks = partial(siglip_vision_model.LAYOUT.blocks, base="text_model", causal=True)
tiny = partial(text, "CLIPTextModel", eos_token_id=2)
