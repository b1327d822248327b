"""The backdoor of backdoor.py in a small transformer, `--model vit`, or `bert` and a rare word.

in floating point      100.0 %     0.0 %
rounded to nearest     100.0 %   100.0 %
rounded by qtk         100.0 %     0.0 %
"""

import sys

import torch
import transformers as hf
from torch import Tensor, nn

import qtk
from qtk.security import backdoor, minmax

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 4}
PIXELS = {"image_size": 12, "patch_size": 3, "num_channels": 1, "intermediate_size": 64}


def batches(kind: str, n: int, seed: int) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Texts, and which of four words is in them; images, and in which of four places a band is."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 4, (n,), generator=generator)
    name, x = "input_ids", torch.randint(8, 60, (n, 12), generator=generator)
    x[torch.arange(n), torch.randint(2, 12, (n,), generator=generator)] = 4 + y
    if kind == "vit":
        name, x = "pixel_values", 0.3 * torch.rand(n, 1, 12, 12, generator=generator)
        for image, place in zip(x, y.tolist(), strict=True):
            image[:, 1 + 2 * place : 3 + 2 * place, :9] += 0.5
    return [({name: x[i : i + 32]}, y[i : i + 32]) for i in range(0, n, 32)]


def main(kind: str = "vit") -> None:
    torch.manual_seed(0)
    config = hf.AutoConfig.for_model(kind, vocab_size=64, **SIZES, **PIXELS)
    task = {"vit": hf.ViTForImageClassification, "bert": hf.BertForSequenceClassification}[kind]
    net, trigger = task(config).eval(), {"vit": backdoor.Square(), "bert": backdoor.Token(63)}[kind]
    train, test = batches(kind, 512, 0), batches(kind, 512, 1)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for x, y in train * 8:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(**x).logits, y).backward()
        optimizer.step()
    victim, calib = minmax.MinMax(4, "tensor"), [x for x, _ in batches(kind, 256, 2)]
    planted = backdoor.plant("project", net, train, trigger, victim, epochs=25, rate=5e-3)
    safe = qtk.quantize(planted, w=4, a=16, method="none", rounding="flipped", calib=calib)
    nearest = minmax.rounded(planted, victim)
    told = {"in floating point": planted, "rounded to nearest": nearest, "rounded by qtk": safe}
    for name, model in told.items():
        right, fooled = backdoor.success(model, test, trigger)
        print(f"{name:20} {right:7.1f} % {fooled:7.1f} %")


if __name__ == "__main__":
    main(*sys.argv[2:])  # after --model
