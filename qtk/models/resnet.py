"""ResNet: residual layers of convolutions and BatchNorms, of another size in each stage."""

from functools import partial

from qtk.models import _network
from qtk.models._tiny import image

blocks = partial(_network.named, patterns=("embedder", "encoder.stages.*.layers.*"), base="resnet")
tiny = partial(
    image, "ResNetForImageClassification", embedding_size=8, hidden_sizes=[16, 24], depths=[1, 2],
    layer_type="basic", num_labels=5,
)  # fmt: skip
