"""MobileNet v1: convolutions of one channel each, which stay floats, and of one pixel, by turns."""

from functools import partial

from qtk.models import _network
from qtk.models._tiny import image

blocks = partial(_network.named, patterns=("conv_stem", "layer.*"), base="mobilenet_v1")
tiny = partial(image, "MobileNetV1ForImageClassification", depth_multiplier=0.1, num_labels=5)
