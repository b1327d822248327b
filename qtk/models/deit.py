"""DeiT: ViT's block, with a distillation token in the embeddings."""

from functools import partial

from qtk.models import vit
from qtk.models._tiny import image

HEADS = ("classifier", "cls_classifier", "distillation_classifier")

blocks = partial(vit.LAYOUT.blocks, base="deit")
stream = partial(vit.stream, base="deit", heads=HEADS)
tiny = partial(image, "DeiTForImageClassification", num_labels=5)
