"""Accuracy of real models: what targets promise, with the margin that one draw needs."""

import pytest
import torch

import qtk
from benchmarks import data

QUIET = {"progress": False}
PLAIN = {"method": "none", "rounding": "nearest", "ranges": "minmax"}


@pytest.fixture(scope="module")
def minilm(minilm_path):
    from transformers import AutoModel, AutoTokenizer

    return AutoModel.from_pretrained(minilm_path).eval(), AutoTokenizer.from_pretrained(minilm_path)


@pytest.fixture(scope="module")
def stsb(shared, minilm):
    model, tokenizer = minilm
    task = data.stsb_test(tokenizer)
    return task, task.embeddings(model)


def cosine(qmodel, stsb) -> float:
    task, wanted = stsb
    return float((task.embeddings(qmodel) * wanted).sum(-1).mean())


def test_a_real_bert_survives_eight_bits(minilm):
    """Needs no data but the package: calibrated and judged on sentences of its own."""
    model, tokenizer = minilm
    words = [
        "seven",
        "ships",
        "sail",
        "home",
        "at",
        "dawn",
        "and",
        "nobody",
        "asks",
        "why",
        "bread",
    ]
    texts = [" ".join(words[i % 7 : i % 7 + 4 + i % 9]) for i in range(64)]
    qmodel = qtk.quantize(
        model, 8, 8, calib=texts[:48], tokenizer=tokenizer, preset="fast", **QUIET
    )
    assert qtk.evaluate(model, qmodel, texts[48:], tokenizer).cosine > 0.99
    assert all(layer.fused for layer in qtk.summary(qmodel).layers)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, least",
    [
        ({"w": 8, "a": 8}, 0.9975),
        ({"w": 8, "a": 8, "preset": "best"}, 0.9985),
        ({"w": 6, "a": 6}, 0.98),
        ({"w": 4, "a": 8, "preset": "best"}, 0.975),
        ({"w": 4, "a": 4}, 0.92),
        ({"w": 4, "a": 4, "activations": "token"}, 0.95),
        ({"w": 4, "a": 16, "group_size": 128}, 0.985),
        ({"w": 4, "a": 16, "group_size": 128, "weights": "asymmetric"}, 0.986),
    ],
    ids=str,
)
def test_minilm_reaches_its_cosine(minilm, stsb, options, least):
    model, tokenizer = minilm
    calib = data.stsb_calibration(0)
    qmodel = qtk.quantize(model, calib=calib, tokenizer=tokenizer, **options, **QUIET)
    assert cosine(qmodel, stsb) >= least


@pytest.mark.slow
def test_minilm_w4a4_still_ranks_sentences(minilm, stsb):
    model, tokenizer = minilm
    calib = data.stsb_calibration(0)
    qmodel = qtk.quantize(model, 4, 4, calib=calib, tokenizer=tokenizer, **QUIET)
    task, _ = stsb
    # draws lie between 80.5 and 81.5; the float model has 82.03
    assert task.spearman(task.embeddings(qmodel)) >= 80.0


@pytest.mark.slow
def test_outlier_suppression_undoes_injected_outliers(shared):
    model, _ = data.opt()
    base = data.perplexity(model, 200)
    model = data.inject_outliers(model)
    assert data.perplexity(model, 200) == pytest.approx(base, rel=1e-4)
    calib = data.opt_calibration(0)
    broken = qtk.quantize(model, 8, 8, calib=calib, **PLAIN, **QUIET)
    mended = qtk.quantize(model, 8, 8, calib=calib, method="os+", rounding="nearest", **QUIET)
    assert data.perplexity(broken, 200) > 1.1 * base
    assert data.perplexity(mended, 200) < 1.02 * base


@pytest.mark.slow
def test_the_vit_keeps_its_accuracy_at_eight_bits(shared):
    model = data.vit()
    pixels, labels = data.cifar10("test", 4000)
    images, _ = data.cifar10("train", 128)
    qmodel = qtk.quantize(model, 8, 8, calib=list(images.split(32)), **QUIET)
    assert data.accuracy(qmodel, pixels, labels) > data.accuracy(model, pixels, labels) - 0.5


@pytest.mark.slow
def test_reference_and_cpu_backends_give_the_same_embeddings(minilm, stsb):
    """Ties fall either way, which adds a small share of what rounding costs."""
    model, tokenizer = minilm
    calib = data.stsb_calibration(0, 64)
    task, _ = stsb
    options = {"calib": calib, "tokenizer": tokenizer, "preset": "fast", **QUIET}
    on_cpu = qtk.quantize(model, 8, 8, backend="cpu", **options)
    reference = qtk.quantize(model, 8, 8, backend="reference", **options)
    reference.load_state_dict(on_cpu.state_dict())  # the same codes
    with torch.no_grad():
        wanted, got, defined = (
            torch.cat([data.embed(m, dict(b)) for b in task.batches[:4]])
            for m in (model, on_cpu, reference)
        )
    rounding, between = (1 - (got * other).sum(-1).mean() for other in (wanted, defined))
    assert between < 0.1 * rounding
