"""Sentence embeddings of a BERT in eight bits.

python examples/bert_embeddings.py [folder or hub name of a BERT encoder]
"""

import sys

import torch
from transformers import AutoModel, AutoTokenizer

import qtk
from qtk.demo.sentences import sentences
from qtk.fidelity.compare import embed
from qtk.models import bert


def main(path: str | None = None) -> torch.Tensor:
    """The cosines between four sentences, by the quantized model."""
    if path is None:
        model, batch = bert.tiny()
        qmodel = qtk.quantize(model, w=8, a=8, calib=[batch])
    else:
        model, tokenizer = AutoModel.from_pretrained(path), AutoTokenizer.from_pretrained(path)
        qmodel = qtk.quantize(model, w=8, a=8, calib=sentences(256))
        texts = ["A dog runs.", "A puppy is running.", "Rates fell.", "Interest went down."]
        batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        vectors = embed(qmodel, batch)
    print(vectors @ vectors.T)
    return vectors @ vectors.T


if __name__ == "__main__":
    main(*sys.argv[1:])
