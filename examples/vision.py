"""Images classified by a ViT in eight-bit integers, and how often it says what the float one says.

python examples/vision.py [folder or hub name of a ViT] [folder of images]

By default a small ViT of random weights and generated images, which print

    no ViT and no images were given: random weights, generated images
    24 linear layers: 3.1 MB, now 0.8 MB
    samples               64
    KL divergence, mean   0.00000 nats
    KL divergence, worst  0.00001 nats
    SQNR of the logits    36.96 dB
    same answer           96.88 %
    worst samples         1 (0.0000), 46 (0.0000), 36 (0.0000)
"""

import sys
from typing import Any

import torch
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

import qtk


def small_vit() -> tuple[ViTForImageClassification, list[dict[str, torch.Tensor]]]:
    """A ViT of random weights, and 64 generated images: smooth spots of colour."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        image_size=64, patch_size=8, num_labels=10,
    )  # fmt: skip
    spots = torch.nn.functional.interpolate(torch.randn(64, 3, 4, 4), 64, mode="bilinear")
    return ViTForImageClassification(config).eval(), [{"pixel_values": x} for x in spots.split(16)]


def main(path: str | None = None, images: str | None = None) -> qtk.Fidelity:
    """Quantizes, says what runs, and compares on the images that calibrated."""
    data: Any
    if path and images:
        model, data = AutoModelForImageClassification.from_pretrained(path).eval(), images
    else:
        print("no ViT and no images were given: random weights, generated images")
        model, data = small_vit()
    qmodel = qtk.quantize(model, w=8, a=8, calib=data, progress=False)
    made = qtk.summary(qmodel)
    before, after = made.float_bytes / 1e6, made.bytes / 1e6
    print(f"{len(made.layers)} linear layers: {before:.1f} MB, now {after:.1f} MB")
    result = qtk.evaluate(model, qmodel, data)
    print(result.table())
    return result


if __name__ == "__main__":
    main(*sys.argv[1:])
