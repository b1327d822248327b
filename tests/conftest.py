"""Fixtures: Triton's interpreter where there is no GPU, seeds, real data and models if present."""

import os

# the models are tiny: on a busy machine threads wait, 70 times slower; processes of tests as well
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import pytest

from benchmarks import data

torch.set_num_threads(1)


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def minilm_path() -> str:
    """The folder of the real BERT that the tests use."""
    try:
        return str(data.minilm_path())
    except FileNotFoundError as absent:
        pytest.skip(str(absent))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data and small real models kept beside the checkout."""
    if not data.SHARED.is_dir():
        pytest.skip("needs the data folder beside the checkout")
    return data.SHARED


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small random BERT and its tokenizer, a word a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    from qtk.demo.sentences import sentences

    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    known = ["[PAD]", "[UNK]", *sorted({word for text in sentences(300) for word in text.split()})]
    words = models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="[UNK]")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=64
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        num_hidden_layers=2, hidden_size=128, num_attention_heads=2, intermediate_size=256,
        vocab_size=len(known), max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder
