"""I-JEPA: ViT's block, without a class token."""

from functools import partial

from qtk.models import vit
from qtk.models._tiny import image

blocks = partial(vit.LAYOUT.blocks, base="ijepa")
tiny = partial(image, "IJepaModel")
