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
from qtk.fidelity.clipping import clipped
from qtk.fidelity.compare import nearest, pool
from qtk.fidelity.result import HINT
from qtk.fidelity.tally import CHUNK, LOGITS, SCORE, WORST, Tally
from tests.zoo import build


def numbers(tally: Tally) -> dict[str, float]:
    return {k: v for k, v in tally.figures().items() if k != "worst" and v is not None}


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
    tally.add(want, got, torch.tensor([0, 0]), kind=LOGITS)
    figures = tally.figures()
    first = 0.5 * log(0.5 / 0.75) + 0.5 * log(0.5 / 0.25)
    second = 0.9 * log(0.9 / 0.2) + 0.1 * log(0.1 / 0.8)
    assert figures["kl"] == pytest.approx((first + second) / 2, rel=1e-6)
    assert figures["worst_kl"] == pytest.approx(second, rel=1e-6)
    assert figures["agreement"] == 0.5
    assert figures["cosine"] is None and figures["worst_cosine"] is None  # of two logits: noise
    assert figures["metric_name"] == "accuracy"
    assert (figures["metric_float"], figures["metric_quantized"]) == (1.0, 0.5)


def test_perplexity_is_the_exponential_of_the_mean_loss() -> None:
    tally = Tally(causal=True)
    want = torch.tensor([[0.25, 0.75], [0.5, 0.5], [0.1, 0.9]]).log()
    tally.add(want, want, torch.tensor([0, 1, -100]), kind=LOGITS)
    figures = tally.figures()
    assert figures["metric_name"] == "perplexity"
    assert figures["metric_float"] == pytest.approx((0.25 * 0.5) ** -0.5, rel=1e-6)


def test_the_sums_do_not_depend_on_how_the_rows_come() -> None:
    want, got = torch.randn(2 * CHUNK + 7, 5), torch.randn(2 * CHUNK + 7, 5)
    labels = torch.randint(0, 5, (len(want),))
    whole, parts = Tally(), Tally()
    whole.add(want, got, labels, kind=LOGITS)
    for x, y, z in zip(want.split(100), got.split(100), labels.split(100), strict=True):
        parts.add(x, y, z, kind=LOGITS)
    assert numbers(whole) == pytest.approx(numbers(parts))


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
    of = (result.cosine, result.worst_cosine, result.kl, result.worst_kl)
    one, zero = pytest.approx(1.0), pytest.approx(0.0, abs=1e-12)
    assert of == ((one, one, None, None) if family == "bert" else (None, None, zero, zero))
    assert result.sqnr == math.inf
    assert result.agreement == 1.0
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
    assert (
        result.samples == batch["attention_mask"][:, 1:].sum()
        and result.metric_name == "perplexity"
    )
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
    result = Fidelity(64, 0.99871, 0.98, 26.318, agreement=0.9375, worst=((7, 0.98), (1, 0.99)))
    assert result.table() == (
        "samples        64\n"
        "cosine, mean   0.99871\n"
        "cosine, worst  0.98000\n"
        "SQNR           26.32 dB\n"
        "same answer    93.75 %\n"
        "worst samples  7 (0.9800), 1 (0.9900)"
    )
    predictions = Fidelity(
        64, None, None, 26.318, 0.00123, 0.9375, "accuracy", 0.75, 0.5, 0.1, (("a.png", 0.1),),
        {"a": 0.001, "b": 0.02},
    )  # fmt: skip
    assert predictions.table() == (
        "samples               64\n"
        "KL divergence, mean   0.00123 nats\n"
        "KL divergence, worst  0.10000 nats\n"
        "SQNR of the logits    26.32 dB\n"
        "same answer           93.75 %\n"
        "accuracy, float       0.7500\n"
        "accuracy, quantized   0.5000\n"
        "worst samples         a.png (0.1000)\n"
        f"clipped at most       2.00 % of the inputs of b\n{HINT}"
    )
    assert "inf dB" in Fidelity(1, 1.0, 1.0, math.inf).table()
    assert "clipped" not in Fidelity(1, 1.0, 1.0, 9.0, clipped={"a": 0.00004}).table()
    few = Fidelity(1, 1.0, 1.0, 9.0, clipped={"a": 0.001})
    assert "0.10 % of the inputs of a" in few.table() and HINT not in few.table()


def test_a_constant_added_to_all_logits_changes_nothing() -> None:
    want, got = torch.randn(9, 4), torch.randn(9, 4)
    plain, moved = Tally(), Tally()
    plain.add(want, got, kind=LOGITS)
    moved.add(want + 5, got - 3, kind=LOGITS)
    assert numbers(moved) == pytest.approx(numbers(plain), rel=1e-5)


def test_single_scores_have_no_distribution() -> None:
    tally = Tally()
    tally.add(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.5], [2.0]]), None, SCORE, ["a", "b"])
    figures = tally.figures()
    assert figures["cosine"] is None and figures["kl"] is None
    assert figures["sqnr"] == pytest.approx(10 * math.log10(5 / 0.25))
    assert figures["worst"] == (("a", 0.5), ("b", 0.0))


def test_the_worst_samples_are_named_worst_first() -> None:
    angles = torch.linspace(0, 1, 30)
    got = torch.stack([angles.cos(), angles.sin()], 1)
    want = torch.tensor([[1.0, 0.0]]).expand(30, 2).clone()
    tally = Tally()
    for part in torch.arange(30).split(7):
        tally.add(want[part], got[part], names=part.tolist())
    worst = tally.figures()["worst"]
    assert [name for name, _ in worst] == list(range(29, 29 - WORST, -1))
    assert worst[0][1] == pytest.approx(math.cos(1.0))
    got[3, 0] = math.nan
    tally.add(want[3:4], got[3:4], names=["broken"])
    assert tally.figures()["worst"][0][0] == "broken"


def test_the_worst_sentence_of_a_language_model_is_the_mean_of_its_tokens() -> None:
    model, batch = build("OPTForCausalLM")
    other, _ = build("OPTForCausalLM")
    with torch.no_grad():
        for p in other.parameters():
            p += 0.02 * torch.randn_like(p)
    whole = qtk.evaluate(model, other, batch)
    rows = [
        qtk.evaluate(model, other, {k: v[i : i + 1] for k, v in batch.items()}) for i in range(2)
    ]
    wanted = sorted(((i, row.kl) for i, row in enumerate(rows)), key=lambda pair: -pair[1])
    assert [name for name, _ in whole.worst] == [name for name, _ in wanted]
    assert [kl for _, kl in whole.worst] == pytest.approx([kl for _, kl in wanted], rel=1e-4)


@pytest.mark.parametrize("cut", [2**26, 1])
def test_the_side_of_the_padding_does_not_matter(cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "MAX_LOGITS", cut)
    model, batch = build("OPTForCausalLM")
    other = deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(1.1)
    ids, mask = batch["input_ids"].clone(), batch["attention_mask"]
    left = {"input_ids": ids.clone(), "attention_mask": mask.flip(1)}
    left["input_ids"][1] = torch.cat([ids[1, 5:], ids[1, :5]])
    right, left = (qtk.evaluate(model, other, data) for data in (batch, left))
    assert right.samples == left.samples == 7 + 4
    for name in ("sqnr", "kl", "worst_kl", "agreement", "metric_float", "metric_quantized"):
        assert getattr(left, name) == pytest.approx(getattr(right, name), rel=1e-4), name


def test_models_may_be_given_by_their_folders(tmp_path: Path) -> None:
    model, batch = build("BertForSequenceClassification")
    qmodel = qtk.quantize(model, calib=[batch], progress=False, preset="fast")
    model.save_pretrained(tmp_path / "float")
    qmodel.save_pretrained(tmp_path / "quantized")
    wanted = qtk.evaluate(model, qmodel, [batch])
    assert wanted.cosine is None and wanted.kl > 0
    for pair in ((tmp_path / "float", qmodel), (str(tmp_path / "float"), tmp_path / "quantized")):
        assert qtk.evaluate(*pair, [batch]) == wanted
    with pytest.raises(qtk.ModelError, match="cannot load"):
        qtk.evaluate(tmp_path / "float", tmp_path, [batch])


def test_models_that_do_not_go_together_are_refused() -> None:
    model, batch = build("BertModel")
    qmodel = qtk.quantize(model, calib=[batch], progress=False, preset="fast")
    for pair, told in (
        ((model, build("ViTModel")[0]), "of different kinds"),
        ((model, build("BertForMaskedLM")[0]), "heads included"),
        ((model, build("BertModel", hidden_size=64)[0]), "have shapes"),
        ((qmodel, model), "the float one first"),
        ((model, 3), "give a model, a folder"),
    ):
        with pytest.raises(qtk.ModelError, match=told):
            qtk.evaluate(*pair, [batch])


def test_a_batch_that_the_model_cannot_read_is_named() -> None:
    model, batch = build("BertModel")
    bad = {**batch, "attention_mask": torch.ones(2, 1, 3, 5)}
    with pytest.raises(qtk.CalibrationError, match="cannot read batch 1"):
        qtk.evaluate(model, model, [batch, bad])


@pytest.mark.parametrize("labels, told", [
    (torch.tensor([0, 1, 2]), r"it must be \[2\]"), (torch.tensor([0, 7]), "label 7"),
])  # fmt: skip
def test_labels_that_do_not_fit_are_refused(labels: torch.Tensor, told: str) -> None:
    model, batch = build("ViTForImageClassification")
    with pytest.raises(qtk.CalibrationError, match=told):
        qtk.evaluate(model, model, {**batch, "labels": labels})


def test_labels_of_one_column_and_scores() -> None:
    model, batch = build("ViTForImageClassification")
    with torch.no_grad():
        best = model(**batch).logits.argmax(-1)
    assert qtk.evaluate(model, model, {**batch, "label": best[:, None]}).metric_float == 1.0
    assert qtk.evaluate(model, model, {**batch, "labels": best.float()}).metric_name is None


def test_texts_with_labels_give_an_accuracy(tiny_bert: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from qtk.demo.sentences import sentences

    names = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert, **names).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    texts = sentences(8)
    with torch.no_grad():
        best = [int(model(**tokenizer(t, return_tensors="pt")).logits.argmax()) for t in texts]
    wrong = [1 - best[0], *best[1:]]
    words = [["bad", "good"][i] for i in wrong]
    for data in (
        list(zip(texts, wrong, strict=True)), list(zip(texts, words, strict=True)),
        [{"text": t, "label": y} for t, y in zip(texts, wrong, strict=True)],
        {"text": texts, "label": wrong},
    ):  # fmt: skip
        result = qtk.evaluate(model, model, data)
        assert (result.metric_name, result.metric_float) == ("accuracy", 7 / 8)
    with pytest.raises(qtk.CalibrationError, match="'fine' is none of the model's classes"):
        qtk.evaluate(model, model, [{"text": texts[0], "label": "fine"}])


@pytest.mark.parametrize("folders, names, found", [
    (["0", "1", "2", "3", "4"], None, True),
    (["a", "b", "c", "d", "e"], None, True),  # as many as there are classes, in order
    (["cat", "DOG", "eel"], ["dog, hound", "fox", "cat", "ant", "eel"], True),
    (["a", "b"], None, False),
    (["cat", "b", "c", "d", "e"], ["dog", "fox", "cat", "ant", "eel"], False),
])  # fmt: skip
def test_class_folders_give_an_accuracy(
    folders: list[str], names: list[str] | None, found: bool, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    import numpy as np
    from PIL import Image
    from transformers import ViTImageProcessorPil

    named = {} if names is None else {
        "id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)},
    }  # fmt: skip
    model, _ = build("ViTForImageClassification", **named)
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    right = {"cat": 2, "DOG": 0, "eel": 4}
    numbers = {name: right.get(name, i) for i, name in enumerate(folders)}
    hits, rng = [], np.random.default_rng(0)
    for name in folders:
        (tmp_path / name).mkdir()
        image = Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8))
        image.save(tmp_path / name / "x.png")
        with torch.no_grad():
            best = model(**processor(image, return_tensors="pt")).logits.argmax()
        hits.append(int(best) == numbers[name])
    with caplog.at_level("WARNING", "qtk"):
        result = qtk.evaluate(model, model, tmp_path, processor)
    assert result.samples == len(folders)
    assert {name for name, _ in result.worst} == {f"{name}/x.png" for name in folders}
    if found:
        assert result.metric_float == sum(hits) / len(hits) and not caplog.text
    else:
        assert result.metric_name is None and "no accuracy" in caplog.text


def test_only_so_many_samples_of_a_file(tiny_bert: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    from qtk.demo.sentences import sentences

    model = AutoModel.from_pretrained(tiny_bert).eval()
    (tmp_path / "a.txt").write_text("\n".join(sentences(40)))
    draws = [
        qtk.evaluate(model, model, tmp_path / "a.txt", samples=9, seed=seed) for seed in (0, 0, 1)
    ]
    assert [draw.samples for draw in draws] == [9] * 3
    assert draws[0] == draws[1] != draws[2]


def test_a_strided_perplexity_is_that_of_the_windows_by_hand() -> None:
    model, _ = build("OPTForCausalLM")
    ids = torch.randint(3, 99, (50,))
    for stride, window in ((16, 16), (5, 16), (1, 16), (7, 60), (50, 50)):
        result = qtk.evaluate(model, model, ids, stride=stride, window=window)
        total, done, begin = 0.0, 0, 0
        while done < 50:
            end = min(begin + window, 50)
            labels = ids[begin:end].clone()
            labels[: max(done - begin, 0)] = -100
            with torch.no_grad():
                logits = model(input_ids=ids[None, begin:end]).logits[0, :-1]
            total += float(torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum"))
            begin, done = begin + stride, end
        counted = result.samples
        lost = 1 if stride < window else -(-50 // window)  # a window's first token, without context
        assert counted == 50 - lost
        assert result.metric_float == pytest.approx(math.exp(total / counted), rel=1e-4)


def test_a_strided_text_is_read_whole(shared: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = shared / "models" / "opt-small-text"
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    texts = ["The first line of a text.", "The second one, which is a little longer."]
    (tmp_path / "a.txt").write_text("\ufeff" + "\n\n".join(texts), encoding="utf-8")
    tokens = len(tokenizer("\n\n".join(texts))["input_ids"])
    options = {"stride": 4, "window": 8}
    whole = qtk.evaluate(model, model, tmp_path / "a.txt", **options)
    assert whole.samples == tokens - 1
    assert whole == qtk.evaluate(model, model, texts, **options)
    assert whole.worst[0][0].startswith("tokens ")


@pytest.mark.parametrize("options, told", [
    ({"stride": 0}, "stride=0"), ({"stride": 9, "window": 8}, "no longer than"),
    ({"stride": 8, "window": 65}, "2 to 64"), ({"stride": True}, "stride=True"),
    ({"stride": 8, "data": [{"input_ids": torch.ones(1, 9)}]}, "stride reads one text"),
    ({"stride": 8, "data": torch.ones(1)}, "reads one text|fewer than two"),
])  # fmt: skip
def test_strides_that_make_no_sense(options: dict, told: str) -> None:
    model, _ = build("OPTForCausalLM")
    with pytest.raises(qtk.QtkError, match=told):
        qtk.evaluate(model, model, **{"data": torch.ones(20, dtype=torch.long), **options})
    with pytest.raises(qtk.ModelError, match="for language models"):
        qtk.evaluate(*[build("BertModel")[0]] * 2, torch.ones(20).long(), stride=4)


@pytest.mark.parametrize("method, clips", [("none", True), ("os+", True), ("rotate", False)])
def test_clipped_inputs_are_counted(method: str, clips: bool) -> None:
    model, batch = build("BertModel")
    qmodel = qtk.quantize(
        model, calib=[batch], method=method, ranges="minmax", rounding="nearest", progress=False
    )
    name = "encoder.layer.0.attention.self.query"
    inside = qtk.evaluate(model, qmodel, [batch])
    assert len(inside.clipped) == 12 and inside.clipped[name] < 0.005
    spikes = 99 * torch.eye(32)[None, :20]  # a large channel each, which a rotation spreads
    outside = qtk.evaluate(model, qmodel, {"inputs_embeds": spikes})
    assert (outside.clipped[name] > 0.02) is clips
    assert HINT in outside.table() or not clips
    assert all(layer.fused for layer in qtk.summary(qmodel).layers)  # the hooks are gone
    assert qtk.evaluate(model, qmodel, [batch]) == inside


def test_a_code_is_clipped_where_it_leaves_the_grid() -> None:
    model, batch = build("BertModel")
    qmodel = qtk.quantize(model, calib=[batch], ranges="minmax", preset="fast", progress=False)
    layer = qmodel.encoder.layer[0].attention.self.query
    x = torch.randn(4, 32) * 5
    codes, _ = layer.quantize(x)
    lo, hi = codes.min(), codes.max()
    at_the_end = (codes == lo) | (codes == hi)
    assert 0 < clipped(layer, x).sum() <= at_the_end.sum()
    assert not (clipped(layer, x) & ~at_the_end).any()


def test_padding_is_not_counted_as_clipped() -> None:
    model, batch = build("BertModel")
    qmodel = qtk.quantize(model, calib=[batch], ranges="minmax", preset="fast", progress=False)
    seen = qtk.evaluate(model, qmodel, [batch]).clipped
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][1, 5:] = 0
    name = "encoder.layer.0.attention.self.query"
    assert qtk.evaluate(model, qmodel, [changed]).clipped[name] == seen[name]


def test_dynamic_grids_clip_nothing_that_is_counted() -> None:
    model, batch = build("BertModel")
    qmodel = qtk.quantize(model, calib=[batch], activations="token", progress=False)
    assert qtk.evaluate(model, qmodel, [batch]).clipped == {}


def test_few_batches_are_run_again_to_count(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = build("BertModel")
    qmodel = qtk.quantize(model, calib=[batch], preset="fast", progress=False)
    calls = []
    qmodel.register_forward_pre_hook(lambda *_: calls.append(1))
    qtk.evaluate(model, qmodel, [batch] * 9)
    assert len(calls) == 9 + 4  # the first, second, fourth and eighth
