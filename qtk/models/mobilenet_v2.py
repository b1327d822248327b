"""MobileNet v2: inverted residuals, whose inner convolutions are of single channels."""

from functools import partial

from qtk.models import _network
from qtk.models._tiny import image

blocks = partial(
    _network.named, patterns=("conv_stem", "layer.*", "conv_1x1"), base="mobilenet_v2"
)  # fmt: skip
tiny = partial(
    image, "MobileNetV2ForImageClassification", depth_multiplier=0.1, num_labels=5
)  # fmt: skip
