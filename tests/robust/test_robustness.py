"""`qtk.robustness`: rows, intervals, checks that catch masked gradients, and bad input."""

import json

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from torch import nn
from torch.nn import functional as F

import qtk
from qtk import intervals
from qtk.models import bert
from qtk.robust import images, pairs, sanity, study
from qtk.robust import suite as suite_module
from qtk.robust.cells import Cells
from qtk.robust.images import Images
from qtk.robust.result import compare, worst_of
from qtk.robust.rows import attacked
from qtk.robust.suite import parts_of

NORMALIZE = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
SUITE = ["noise", "apgd_ce", "square"]


def run(pair, **changes):
    model, qmodel, second, pixels, labels = pair
    settings = {
        "suite": SUITE, "second": second, "normalize": NORMALIZE, "budgets": ("mid",), "steps": 4,
        "progress": False, **changes,
    }  # fmt: skip
    data = settings.pop("data", (pixels, labels))
    return qtk.robustness(model, settings.pop("qmodel", qmodel), data, **settings)


@pytest.fixture(scope="module")
def found(pair):
    return run(pair)


def test_rows_add_up(found):
    clean = found.row("clean")
    assert clean.accuracy_float == 1.0 and clean.samples == found.samples == 24
    for row in found.rows:
        assert row.difference == pytest.approx(row.accuracy_quantized - row.accuracy_float)
        assert row.difference == pytest.approx(row.gained - row.lost)
        assert row.low <= row.difference <= row.high
        assert row.float_interval[0] <= row.accuracy_float <= row.float_interval[1]
        assert (
            row.accuracy_float <= clean.accuracy_float
            and row.accuracy_quantized <= clean.accuracy_quantized
        )
    assert set(found.floor) == {"clean", "noise", "attack", "transfer", "worst"}


def test_the_worst_case_is_never_weaker_than_its_parts(found):
    for prefix in ("", "unrounded "):
        worst = found.row("worst case", f"{prefix}mid")
        parts = [r for r in found.rows if r.level == worst.level and r.kind != "worst"]
        assert len(parts) == 4  # noise, Square, APGD, APGD from the other model
        assert worst.accuracy_float <= min(r.accuracy_float for r in parts)
        assert worst.accuracy_quantized <= min(r.accuracy_quantized for r in parts)


def test_a_result_is_json_and_text(found):
    told = json.loads(json.dumps(found.to_dict()))
    assert told["conclusion"] == found.conclusion and len(told["rows"]) == len(found.rows)
    assert "worst case mid" in found.table() and "from the other model" not in found.table()
    assert "from the other model" in found.table(every=True)


def test_it_repeats_itself_and_goes_on_from_what_was_kept(pair, tmp_path, monkeypatch, found):
    first = run(pair, resume=tmp_path)
    assert first.rows == found.rows
    files = sorted(tmp_path.iterdir())
    assert len(files) > 5 and all(file.suffix == ".json" for file in files)
    files[0].unlink()
    assert run(pair, resume=tmp_path).rows == first.rows
    monkeypatch.setattr(study, "right", None)  # nothing is answered anew
    assert run(pair, resume=tmp_path).rows == first.rows
    files[1].write_text("{")
    with pytest.raises(qtk.CheckpointError, match="delete it"):
        run(pair, resume=tmp_path)


def test_what_is_wrong_already_may_be_spared(pair, monkeypatch):
    """Square sees what APGD left right for somebody, and its row counts the others as wrong."""
    suite, seen = ["noise", "square", "apgd_ce"], []
    every = run(pair, suite=suite, second=None)
    square = suite_module.load("robust.attack", "square")
    perturb = square.perturb
    monkeypatch.setattr(square, "perturb", lambda *a: seen.append(len(a[1])) or perturb(*a))
    found = run(pair, suite=suite, second=None, thorough=False)
    for level in ("mid", "unrounded mid"):
        for side in ("accuracy_float", "accuracy_quantized"):
            before, after = (
                [getattr(r, side) for r in (f.row("apgd_ce", level), f.row("worst case", level))]
                for f in (every, found)
            )
            assert before[0] == after[0]  # the first attack is what it was
            assert getattr(found.row("square", level), side) <= after[0]
            assert after[1] <= after[0]
    apgd = found.row("apgd_ce", "mid")
    for accuracy, n in zip((apgd.accuracy_float, apgd.accuracy_quantized), seen, strict=True):
        assert accuracy * 24 <= n < 24  # what either model or either rounding has right, no more
    assert "spared" in found.notes[0] and not every.notes


def test_studies_of_one_float_model_share_its_answers(pair, tmp_path):
    options = {"suite": ["preprocessing"], "second": None, "resume": tmp_path}
    first = run(pair, **options)
    files = len([*tmp_path.iterdir()])
    assert files == 4  # two models, clean and preprocessed
    other = run(pair, qmodel=pair[2], **options)
    assert len([*tmp_path.iterdir()]) == files + 2
    assert [r.accuracy_float for r in first.rows] == [r.accuracy_float for r in other.rows]


def test_a_float_model_is_as_robust_as_itself(pair):
    same = run(pair, qmodel=pair[0], second=None)
    assert all(row.difference == 0 and row.p == 1 for row in same.rows)
    assert same.floor == {} and "second=" in same.table()


class Masked(nn.Module):
    """A model that rounds its input without a straight-through gradient: robust to nothing."""

    def __init__(self, model):
        super().__init__()
        self._held = (model,)
        self.eval()

    def forward(self, x):
        return self._held[0]((x * 32).round() / 32 + 0 * x)


def test_no_model_is_called_robust_for_hiding_its_gradient(pair):
    """The checks pass for the quantized model, and fail for one whose gradient is zero."""
    model, qmodel, _, pixels, labels = pair
    readers = {
        r: images.Pixels(m, *NORMALIZE) for r, m in (("float", model), ("quantized", qmodel))
    }
    seen = Images(pixels, labels, *NORMALIZE)
    parts = parts_of(SUITE, {"linf": [8 / 255]}, 768)

    def checked(models):
        one = study.Study(seen, models, Cells(None, {}), 10, 64, 0, print)
        return {
            (c.model, c.name): c.passed
            for c in sanity.checks(one, parts, attacked(one, parts, 0)[2])
        }  # fmt: skip

    with images.frozen(model, qmodel):
        assert all(checked(readers).values())
        hidden = checked({**readers, "quantized": Masked(readers["quantized"])})
    assert not hidden["quantized", "white box against transfer"]
    assert not hidden["quantized", "enormous budget"]
    assert all(passed for (model, _), passed in hidden.items() if model == "float")


def test_a_failed_check_withholds_the_conclusion(found):
    from dataclasses import replace

    broken = replace(found, checks=(replace(found.checks[0], passed=False), *found.checks[1:]))
    assert broken.conclusion.startswith("gradients masked?") and not broken.is_conclusive
    unseen = replace(found, checks=(replace(found.checks[0], passed=None),))
    assert unseen.conclusion.startswith("no conclusion") and not unseen.is_conclusive


def test_the_checks_need_what_they_compare(pair):
    told = run(pair, suite="noise", second=None)
    assert told.conclusion.startswith("no conclusion: not checked were gradients against")


def test_intervals_are_those_of_the_textbook():
    # Wilson's for 8 of 10, as in Brown, Cai and DasGupta 2001
    assert intervals.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert intervals.wilson(0, 0) == (0, 1)
    for lost, gained in ((1, 6), (5, 5), (0, 0), (9, 2)):
        n = lost + gained
        exact = binomtest(min(lost, gained), n).pvalue if n else 1.0
        assert intervals.mcnemar(lost, gained) == pytest.approx(exact)
    rng = np.random.default_rng(0)
    first, second = rng.random(500) < 0.7, rng.random(500) < 0.6
    pair = pairs.paired(first, second)
    spread = np.std([  # the bootstrap, sample by sample
        (second[i].mean() - first[i].mean()) for i in rng.integers(0, 500, (1000, 500))
    ])  # fmt: skip
    assert (pair.high - pair.low) / 3.92 == pytest.approx(spread, rel=0.12)


def test_the_worst_of_what_was_not_seen_is_not_judged():
    worst = worst_of([np.array([1, 1, 0, -1], np.int8), np.array([1, 0, 0, -1], np.int8)])
    assert worst.tolist() == [1, 0, 0, -1]
    row = compare("a", "attack", "", None, (worst, worst), (worst, worst), 0)
    assert row.samples == 3 and row.accuracy_float == pytest.approx(1 / 3)


def test_rounding_never_leaves_the_ball_or_the_grid():
    x = torch.randint(0, 256, (4, 3, 5, 5)) / 255
    moved = (x + (torch.rand_like(x) - 0.5) * 2 * 3 / 255).clamp(0, 1)
    image = study.rounded(moved, x)
    assert ((image - x).abs() <= (moved - x).abs() + 1e-6).all()
    assert (image * 255 - (image * 255).round()).abs().max() < 1e-3
    whole = (x + 2 / 255).clamp(0, 1)
    assert torch.allclose(study.rounded(whole, x), whole, atol=1e-6)  # whole steps survive


def test_files_are_read_as_the_processor_reads_them(pair, tmp_path):
    image = pytest.importorskip("PIL.Image")
    from transformers import ViTImageProcessorPil

    names = list(pair[0].config.id2label.values())[:2]
    for label, name in enumerate(names):
        (tmp_path / name).mkdir()
        for i in range(2):
            colour = (40 * i, 200 * label, 90)
            image.new("RGB", (16, 16), colour).save(tmp_path / name / f"{i}.png")
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=[0.5] * 3,
                                     image_std=[0.25] * 3)  # fmt: skip
    seen = images.read(pair[0], tmp_path, processor)
    assert seen.labels.tolist() == [0, 0, 1, 1] and len(seen.files) == 4
    assert (seen.pixels[3] * 255)[:, 0, 0].tolist() == pytest.approx([40, 200, 90], abs=1e-3)
    assert (seen.mean, seen.std) == ((0.5,) * 3, (0.25,) * 3)


@pytest.mark.parametrize("change, message", [
    ({"data": (3 * torch.rand(4, 3, 16, 16), torch.zeros(4).long())}, "before normalisation"),
    ({"data": (torch.rand(4, 1, 16, 16), torch.zeros(4).long())}, "3 channels; the images have 1"),
    ({"data": (torch.rand(4, 3, 16, 16), torch.full((4,), 7))}, "labels lie in 7 to 7"),
    ({"data": (torch.rand(4, 3, 16, 16), torch.zeros(3).long())}, "labels \\[3\\]"),
    ({"data": (torch.rand(4, 3, 16, 16), torch.rand(4))}, "labels are floats"),
    ({"data": (torch.rand(0, 3, 16, 16), torch.zeros(0).long())}, "no image"),
    ({"data": []}, "no image"),
    ({"normalize": None}, "normalize="),
    ({"suite": "pgd"}, "choose among"),
    ({"suite": []}, r"suite=\[\]"),
    ({"suite": ["noise", "word_noise"]}, "is for text"),
    ({"budgets": ("huge",)}, "choose among"),
    ({"budgets": {"linf": [-1]}}, "above zero"),
    ({"steps": 0}, "steps=0"),
])  # fmt: skip
def test_bad_input_is_named(pair, change, message):
    with pytest.raises(qtk.QtkError, match=message):
        run(pair, **change)


def test_a_missing_extra_is_named(pair, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "foolbox", None)
    with pytest.raises(qtk.QtkError, match=r"qtk-torch\[robust\]"):
        run(pair, suite="fgsm")


def test_a_model_without_a_head_is_named(pair):
    model, _ = bert.tiny()
    with pytest.raises(qtk.ModelError, match="no image head"):
        qtk.robustness(model, model, (pair[3], pair[4]), progress=False)
    with pytest.raises(qtk.ModelError, match="no text head"):
        qtk.robustness(model, model, [("a", 0)], suite="text", progress=False)


def test_text_is_attacked_in_its_embeddings_and_in_its_words(tiny_bert):
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    from qtk.demo.sentences import sentences

    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    torch.manual_seed(0)
    config = BertConfig.from_pretrained(tiny_bert, num_labels=2)
    model = BertForSequenceClassification(config).eval()
    texts = sentences(24)
    batch = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    qmodel = qtk.quantize(model, w=8, a=8, calib=[batch], progress=False)
    with torch.no_grad():
        labels = model(**batch).logits.argmax(-1).tolist()
    found = qtk.robustness(
        model, qmodel, list(zip(texts, labels, strict=True)), "text", tokenizer, steps=4,
        budgets={"token": [2.0], "rate": [0.3]}, batch_size=12, progress=False,
    )  # fmt: skip
    assert found.row("clean").accuracy_float == 1.0
    pgd = found.row("embedding_pgd", "token 2")
    assert (
        pgd.accuracy_float < 0.5 and pgd.accuracy_quantized < 0.5
    )  # twice an embedding's length goes anywhere
    assert {r.name for r in found.rows if r.kind == "attack"} == {
        "embedding_pgd", "character_noise", "word_noise",
    }  # fmt: skip


def test_cross_entropy_is_pytorchs():
    from qtk.robust.ball import cross_entropy

    logits, y = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    assert torch.allclose(cross_entropy(logits, y).mean(), F.cross_entropy(logits, y))
