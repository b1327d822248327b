"""A small classifier of images, what it is quantized to, and images that it has right."""

import pytest
import torch

import qtk
from qtk.models import vit

NORMALIZE = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


@pytest.fixture(scope="session")
def pair():
    """model, qmodel, second, pixels [24, 3, 16, 16] on the grid of bytes, the model's answers."""
    torch.manual_seed(0)
    model, _ = vit.tiny()
    pixels = torch.randint(0, 256, (24, 3, 16, 16)) / 255
    others = torch.rand(24, 3, 16, 16)
    quantized = [
        qtk.quantize(model, w=4, a=4, calib=[{"pixel_values": 2 * x - 1}], progress=False)
        for x in (pixels, others)
    ]
    with torch.no_grad():
        labels = model(pixel_values=2 * pixels - 1).logits.argmax(-1)
    return model, *quantized, pixels, labels
