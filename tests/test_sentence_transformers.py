"""SentenceTransformer and CrossEncoder: in and out, with everything that lies in their folders."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qtk
from qtk.demo.sentences import sentences
from qtk.integrations.sentence_transformers import OwnLength

st = pytest.importorskip("sentence_transformers")

TEXTS = sentences(48)
CALIB, REST = TEXTS[:24], TEXTS[24:]


@pytest.fixture(scope="module")
def embedder(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A SentenceTransformer with a Dense, as LaBSE has one, loaded from its folder."""
    from sentence_transformers.sentence_transformer import modules

    transformer = modules.Transformer(str(tiny_bert))
    dense = modules.Dense(in_features=128, out_features=16)
    model = st.SentenceTransformer(modules=[transformer, modules.Pooling(128), dense], device="cpu")
    model.max_seq_length = 12
    folder = tmp_path_factory.mktemp("st") / "embedder"
    model.save_pretrained(str(folder))
    return st.SentenceTransformer(str(folder), device="cpu")


@pytest.fixture(scope="module")
def ranker(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("st") / "ranker"
    torch.manual_seed(0)
    model = BertForSequenceClassification.from_pretrained(tiny_bert, num_labels=1)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(folder)
    return st.CrossEncoder(str(folder), device="cpu")


def test_a_sentence_transformer_goes_in_and_comes_out(embedder: Any, tmp_path: Path) -> None:
    before = embedder.encode(TEXTS)
    quantized = qtk.quantize(embedder, calib=CALIB, preset="fast", progress=False)
    assert type(quantized) is type(embedder) and quantized is not embedder
    assert np.array_equal(embedder.encode(TEXTS), before)
    y = quantized.encode(TEXTS)
    assert not np.array_equal(y, before)
    assert torch.cosine_similarity(*map(torch.from_numpy, (y, before))).min() > 0.99
    quantized.save_pretrained(str(tmp_path / "out"))
    names = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*")}
    assert {"modules.json", "1_Pooling", "2_Dense/model.safetensors", "tokenizer.json"} <= names
    again = st.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert np.array_equal(again.encode(TEXTS), y) and again.max_seq_length == 12
    assert qtk.evaluate(embedder, quantized, REST).samples == len(REST)
    assert all(layer.scheme == "W8A8" for layer in qtk.summary(quantized).layers)


def test_in_place_it_is_the_same_object(tiny_bert: Path) -> None:
    model = st.SentenceTransformer(str(tiny_bert), device="cpu")
    assert qtk.quantize(model, calib=CALIB, inplace=True, preset="fast", progress=False) is model
    assert qtk.summary(model).layers[0].scheme == "W8A8"


def test_a_cross_encoder_is_calibrated_on_pairs(ranker: Any, tmp_path: Path) -> None:
    pairs = list(pairwise(TEXTS))
    before = ranker.predict(pairs)
    quantized = qtk.quantize(ranker, calib=pairs[:24], preset="fast", progress=False)
    y = quantized.predict(pairs)
    assert type(quantized) is type(ranker) and np.abs(y - before).max() < 0.05  # of a sigmoid
    quantized.save_pretrained(str(tmp_path / "out"))
    again = st.CrossEncoder(str(tmp_path / "out"), device="cpu")
    assert np.array_equal(again.predict(pairs), y)


def test_calibration_is_cut_where_the_model_cuts(embedder: Any) -> None:
    tokenizer = OwnLength(embedder.tokenizer, embedder.max_seq_length)
    ids = tokenizer([" ".join(TEXTS)], truncation=True, max_length=256)["input_ids"]
    assert len(ids[0]) == 12 and len(tokenizer) == len(embedder.tokenizer)


def test_it_is_exported_with_its_folders(embedder: Any, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    quantized = qtk.quantize(embedder, calib=CALIB, method="none", preset="fast", progress=False)
    found = qtk.export(quantized, tmp_path / "out", "compressed-tensors", data=REST)
    assert {"2_Dense/model.safetensors", "modules.json", "tokenizer.json"} <= set(found.companions)
    assert "2_Dense/config.json" in found.companions and found.cosine > 0.9999


@pytest.mark.slow
def test_a_spawned_pool_gives_the_same_bits(embedder: Any) -> None:
    quantized = qtk.quantize(embedder, calib=CALIB, preset="fast", progress=False)
    pool = quantized.start_multi_process_pool(["cpu", "cpu"])
    try:
        y = quantized.encode(TEXTS, pool=pool, chunk_size=24, batch_size=24)
    finally:
        quantized.stop_multi_process_pool(pool)
    alone = [quantized.encode(part, batch_size=24) for part in (TEXTS[:24], TEXTS[24:])]
    assert np.array_equal(y, np.concatenate(alone))
