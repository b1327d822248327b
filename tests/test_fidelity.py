"""evaluate(): exact figures on hand-made tensors, and real models against themselves."""

import json
import math
from copy import deepcopy
from pathlib import Path

import pytest
import torch

import qtk
from qtk.discover import load
from qtk.fidelity import Fidelity, compare
from qtk.fidelity.compare import nearest, pool
from qtk.fidelity.speed import ENOUGH, hardware, race
from qtk.fidelity.tally import CHUNK, Tally


def test_figures_of_hand_made_embeddings() -> None:
    tally = Tally()
    tally.add(torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    figures = tally.figures()
    assert figures["samples"] == 2
    assert figures["cosine"] == pytest.approx(0.5)
    assert figures["worst_cosine"] == pytest.approx(0.0)
    assert figures["sqnr"] == pytest.approx(10 * math.log10(26 / 2))
    assert figures["kl"] is None and figures["agreement"] is None


def test_figures_of_hand_made_logits() -> None:
    log = math.log
    want = torch.tensor([[log(0.5), log(0.5)], [log(0.9), log(0.1)]])
    got = torch.tensor([[log(0.75), log(0.25)], [log(0.2), log(0.8)]])
    tally = Tally()
    tally.add(want, got, torch.tensor([0, 0]), answers=True)
    figures = tally.figures()
    first = 0.5 * log(0.5 / 0.75) + 0.5 * log(0.5 / 0.25)
    second = 0.9 * log(0.9 / 0.2) + 0.1 * log(0.1 / 0.8)
    assert figures["kl"] == pytest.approx((first + second) / 2, rel=1e-6)
    assert figures["agreement"] == 0.5
    assert figures["metric_name"] == "accuracy"
    assert (figures["metric_float"], figures["metric_quantized"]) == (1.0, 0.5)


def test_perplexity_is_the_exponential_of_the_mean_loss() -> None:
    tally = Tally(causal=True)
    want = torch.tensor([[0.25, 0.75], [0.5, 0.5], [0.1, 0.9]]).log()
    tally.add(want, want, torch.tensor([0, 1, -100]), answers=True)
    figures = tally.figures()
    assert figures["metric_name"] == "perplexity"
    assert figures["metric_float"] == pytest.approx((0.25 * 0.5) ** -0.5, rel=1e-6)


def test_the_sums_do_not_depend_on_how_the_rows_come() -> None:
    want, got = torch.randn(2 * CHUNK + 7, 5), torch.randn(2 * CHUNK + 7, 5)
    labels = torch.randint(0, 5, (len(want),))
    whole, parts = Tally(), Tally()
    whole.add(want, got, labels, answers=True)
    for x, y, z in zip(want.split(100), got.split(100), labels.split(100), strict=True):
        parts.add(x, y, z, answers=True)
    assert whole.figures() == pytest.approx(parts.figures())


def test_nan_is_not_hidden() -> None:
    tally = Tally()
    tally.add(torch.ones(2, 3), torch.tensor([[1.0, 1.0, math.nan], [1.0, 1.0, 1.0]]))
    figures = tally.figures()
    assert math.isnan(figures["cosine"]) and math.isnan(figures["worst_cosine"])
    assert math.isnan(figures["sqnr"])


def test_nearest_is_another_sample_and_the_same_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.nn.functional.normalize(torch.randn(50, 8), dim=-1)
    expected = (x @ x.T).fill_diagonal_(-2).argmax(-1)
    assert torch.equal(nearest(x), expected)
    monkeypatch.setattr(compare, "CHUNK", 7)
    assert torch.equal(nearest(x), expected)


def test_padding_does_not_enter_an_embedding() -> None:
    hidden = torch.randn(1, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0]])
    changed = hidden.clone()
    changed[:, 2:] = 99.0
    assert torch.equal(pool(hidden, mask), pool(changed, mask))
    assert pool(hidden, None).norm() == pytest.approx(1.0)


@pytest.mark.parametrize("family", ["bert", "opt", "vit"])
def test_a_model_agrees_with_itself(family: str) -> None:
    model, batch = load("models", family).tiny()
    result = qtk.evaluate(model, deepcopy(model), [batch])
    assert result.cosine == pytest.approx(1.0) and result.worst_cosine == pytest.approx(1.0)
    assert result.sqnr == math.inf
    assert result.agreement == 1.0
    assert result.kl in (None, pytest.approx(0.0, abs=1e-12))
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["sqnr"] is None


def test_labels_give_accuracy_in_every_form_of_data() -> None:
    model, batch = load("models", "vit").tiny()
    pixels = batch["pixel_values"]
    with torch.no_grad():
        best = model(pixels).logits.argmax(-1)
    labels = torch.stack([best[0], (best[1] + 1) % 5])  # the first is right, the second is not
    one = {"pixel_values": pixels, "labels": labels}
    for data in (one, [one], iter([one]), [(pixels, labels)]):
        result = qtk.evaluate(model, model, data)
        assert (result.metric_name, result.metric_float) == ("accuracy", 0.5)
    assert qtk.evaluate(model, model, pixels).metric_name is None


def test_perplexity_ignores_padding_and_does_not_depend_on_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, batch = load("models", "opt").tiny()
    ids, mask = batch["input_ids"], batch["attention_mask"].clone()
    mask[1, 5:] = 0
    padded = {"input_ids": ids, "attention_mask": mask}
    result = qtk.evaluate(model, model, padded)
    assert result.samples == 7 + 4  # the first token is predicted by nothing
    with torch.no_grad():
        losses = [
            model(input_ids=x[None], labels=x[None]).loss * (len(x) - 1)
            for x in (ids[0], ids[1, :5])
        ]
    assert result.metric_name == "perplexity"
    assert result.metric_float == pytest.approx(float((sum(losses) / 11).exp()), rel=1e-4)
    monkeypatch.setattr(compare, "MAX_LOGITS", 1)  # a sequence at a time
    again = qtk.evaluate(model, model, padded)
    assert again.metric_float == pytest.approx(result.metric_float, rel=1e-4)
    assert again.samples == result.samples


def test_given_labels_mask_the_perplexity() -> None:
    model, batch = load("models", "opt").tiny()
    labels = batch["input_ids"].clone()
    labels[:, :4] = -100
    result = qtk.evaluate(model, model, {**batch, "labels": labels})
    assert result.samples == 14 and result.metric_name == "perplexity"
    free = qtk.evaluate(model, model, batch)
    assert result.metric_float != free.metric_float


def test_training_mode_is_given_back() -> None:
    model, batch = load("models", "bert").tiny()
    other = deepcopy(model)
    model.train(), other.eval()
    qtk.evaluate(model, other, [batch])
    assert model.training and not other.training
    with pytest.raises(qtk.CalibrationError):
        qtk.evaluate(model, other, [{"input_ids": torch.full((1, 3), 1000)}])
    assert model.training


def test_every_line_of_a_text_file_counts(tmp_path: Path, minilm_path: str) -> None:
    from transformers import AutoTokenizer

    model, _ = load("models", "bert").tiny()
    model.resize_token_embeddings(30522)
    model.config.max_position_embeddings = 64
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i}\n\n" for i in range(300)))
    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    assert qtk.evaluate(model, model, text, tokenizer).samples == 300
    text.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(qtk.CalibrationError, match="UTF-8"):
        qtk.evaluate(model, model, str(text), tokenizer)


@pytest.mark.parametrize("data", [[], "nowhere.txt", [{"pixel_values": torch.zeros(1)}]])
def test_data_that_cannot_be_used_is_refused(data: object) -> None:
    model, _ = load("models", "bert").tiny()
    with pytest.raises(qtk.CalibrationError):
        qtk.evaluate(model, model, data)


def test_table_of_figures() -> None:
    result = Fidelity(64, 0.99871, 0.98, 26.318, 0.00123, 0.9375, "accuracy", 0.75, 0.5)
    assert result.table() == (
        "samples              64\n"
        "cosine, mean         0.99871\n"
        "cosine, worst        0.98000\n"
        "SQNR                 26.32 dB\n"
        "KL divergence        0.00123 nats\n"
        "same answer          93.75 %\n"
        "accuracy, float      0.7500\n"
        "accuracy, quantized  0.5000"
    )
    assert "inf dB" in Fidelity(1, 1.0, 1.0, math.inf).table()


def test_a_slow_race_ends_early() -> None:
    calls = []

    class Slow(torch.nn.Linear):
        def forward(self, **batch: torch.Tensor) -> None:
            calls.append(batch)

    race({"slow": Slow(1, 1)}, {}, rounds=50, warmup=1, limit=0.0)
    assert len(calls) == 1 + ENOUGH


def test_race_times_every_model_in_every_round() -> None:
    model, batch = load("models", "bert").tiny()
    times = race({"a": model, "b": model}, batch, rounds=3, warmup=1)
    assert set(times) == {"a", "b"} and all(t > 0 for t in times.values())
    assert hardware()["cpu"] and hardware()["threads"] >= 1
