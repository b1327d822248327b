"""qtk.fairness against brute force, against formulas written out, and against fairlearn."""

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import qtk
from qtk import intervals
from qtk.discover import available, load
from qtk.errors import CalibrationError, ModelError, SchemeError
from qtk.fair import census, classifier, decoder, groups
from qtk.fair.answer import Answer, decide, ties
from qtk.fair.domain import Domain
from qtk.fair.retrain import retrain
from qtk.fair.rows import Columns
from qtk.fair.sides import Sides
from qtk.fair.text import SWAPS, filled, swapped
from qtk.models import bert

SEX = census.COLUMNS.attribute("sex")


class TableForSequenceClassification(nn.Module):
    """Logits looked up by row: any function of a small domain."""

    def __init__(self, domain, favours):
        super().__init__()
        self.domain, self.favours = domain, nn.Parameter(favours.float(), requires_grad=False)
        self.config = SimpleNamespace(num_labels=2)

    def forward(self, input_ids, return_dict=True):
        p = self.favours[self.domain.index(input_ids)]
        return SimpleNamespace(logits=torch.stack([torch.zeros_like(p), p], 1))


def toy(seed, values=3):
    """Three positions of 1, 4 and `values` ids, and two models that differ on some rows."""
    generator = torch.Generator().manual_seed(seed)
    domain = Domain(((0,), (1, 2, 3, 4), tuple(range(5, 5 + values))))
    scores = [torch.randn(domain.size, generator=generator) for _ in range(2)]
    return domain, [TableForSequenceClassification(domain, score) for score in scores]


@pytest.fixture(scope="module")
def trained():
    rows, labels, *_ = census.split(2000, 10)
    return classifier.train(classifier.bert(census.COLUMNS), rows, labels, epochs=8)


@pytest.mark.parametrize("values", [2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_the_whole_domain_is_counted_as_by_brute_force(seed, values):
    domain, models = toy(seed, values)
    rows = domain.all()
    attribute = qtk.Attribute("a", 2, domain.ids[2])
    found = qtk.fairness(*models, rows, attribute, probe=["exhaustive"], progress=False)
    answer = [
        {key: float(m.favours[i]) > 0 for i, key in enumerate(map(tuple, rows.tolist()))}
        for m in models
    ]
    unfair = [
        [len({says[0, x, a] for a in domain.ids[2]}) > 1 for x in domain.ids[1]] for says in answer
    ]
    (row,) = found.instances
    assert (row.tested, row.found, row.found_quantized) == (4, sum(unfair[0]), sum(unfair[1]))
    assert row.became_unfair == sum(b > a for a, b in zip(*unfair, strict=True))
    assert row.became_fair == sum(a > b for a, b in zip(*unfair, strict=True))
    assert row.became_unfair - row.became_fair == row.found_quantized - row.found
    for churn in (churn for churn in found.churn if churn.where == "domain"):
        keys = [k for k in answer[0] if churn.group in ("all", f"a = {k[2]}")]
        assert churn.samples == len(keys)
        assert churn.changed == sum(answer[0][k] != answer[1][k] for k in keys)
        assert churn.gained == sum(answer[1][k] > answer[0][k] for k in keys)
        assert churn.gained + churn.lost == churn.changed


def test_a_model_compared_with_itself_changes_nothing(trained):
    rows, labels = census.split(10, 300)[2:]
    found = qtk.fairness(
        trained, trained, rows, SEX, labels, second=trained, exhaustive=False,
        domain=census.COLUMNS.domain, probe=["neighbours"], progress=False,
    )  # fmt: skip
    assert all(f.difference == 0 and f.floor == 0 and not f.is_difference for f in found.figures)
    assert all(churn.changed == churn.second == churn.between == 0 for churn in found.churn)
    assert found.domain is None and found.wrong_p == 1
    assert "no difference" in found.table()


def test_group_metrics_are_fairlearns():
    fairlearn = pytest.importorskip("fairlearn.metrics")
    rng = np.random.default_rng(0)
    group, label, decision = rng.integers(0, 2, (3, 500))
    decision |= group & rng.integers(0, 2, 500)
    counts = groups.cells(*map(torch.from_numpy, (group, label, decision))).astype(float)
    frame = fairlearn.MetricFrame(
        metrics={
            "P": fairlearn.selection_rate, "TPR": fairlearn.true_positive_rate,
            "FPR": fairlearn.false_positive_rate,
        },
        y_true=label, y_pred=decision, sensitive_features=group,
    ).by_group  # fmt: skip
    gap = frame.loc[0] - frame.loc[1]
    expected = {
        "SPD": gap.P, "DI": frame.loc[0].P / frame.loc[1].P, "EOD": gap.TPR,
        "AOD": (gap.TPR + gap.FPR) / 2, "|AOD|": (abs(gap.TPR) + abs(gap.FPR)) / 2,
    }  # fmt: skip
    for name, value in expected.items():
        assert abs(float(groups.METRICS[name](counts)) - value) < 1e-12
    parity = fairlearn.demographic_parity_difference(label, decision, sensitive_features=group)
    odds = fairlearn.equalized_odds_difference(label, decision, sensitive_features=group)
    assert abs(abs(float(groups.spd(counts))) - parity) < 1e-12
    assert abs(max(abs(gap.TPR), abs(gap.FPR)) - odds) < 1e-12


def test_metrics_are_differences_of_shares_counted_by_hand():
    group = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    label = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1])
    good = torch.tensor([0, 0, 0, 1, 0, 1, 1, 1])
    counts = groups.cells(group, label, good).astype(float)
    values = {name: float(metric(counts)) for name, metric in groups.METRICS.items()}
    assert values == {"SPD": -0.5, "DI": 1 / 3, "EOD": -0.5, "AOD": -0.5, "|AOD|": 0.5}


def test_intervals_of_known_counts():
    low, high = intervals.wilson(5, 10)  # (p + z2/2n -+ z sqrt(pq/n + z2/4n2)) / (1 + z2/n)
    assert abs(low - 0.236593) < 1e-6 and abs(high - 0.763407) < 1e-6
    assert intervals.wilson(0, 10)[0] == 0 and intervals.wilson(10, 10)[1] == 1
    assert intervals.mcnemar(0, 5) == 2 / 32 and intervals.mcnemar(3, 3) == 1
    assert intervals.mcnemar(0, 0) == 1 and 0 < intervals.mcnemar(0, 1000) < 1e-300
    found, low, high = intervals.ratio(0, 100, 10, 100)
    assert found == 0 < low < high < 1
    assert math.isnan(intervals.ratio(0, 5, 0, 5)[0]) and intervals.ratio(1, 5, 0, 5)[0] == math.inf


def test_the_bootstrap_of_cells_is_the_bootstrap_of_rows():
    """For a share the resampled mean is binomial: its percentiles are known."""
    stats = pytest.importorskip("scipy.stats")
    n, hits = 400, 100
    low, high = intervals.bootstrap(np.array([n - hits, hits]), lambda c: c[:, 1] / n, 0)
    want = stats.binom(n, hits / n).ppf([0.025, 0.975]) / n
    # the standard error of a 2.5 % quantile from 1,000 draws is below .25 of a deviation
    assert np.abs(np.array([low, high]) - want).max() < math.sqrt(0.25 * 0.75 / n)


def test_a_tie_goes_to_the_lower_class():
    logits = torch.tensor([[1.0, 1.0], [0.0, 1.0], [2.0, 2.0]])
    assert decide(logits).tolist() == [0, 1, 0] and ties(logits) == 2


def test_rows_of_a_domain_are_numbered_both_ways():
    domain = Domain(((0,), (3, 1), (9, 4, 7)))
    rows = domain.all()
    assert rows.tolist() == [[0, *pair] for pair in itertools.product((3, 1), (9, 4, 7))]
    assert torch.equal(domain.index(rows), torch.arange(6))
    assert torch.equal(domain.tokens(domain.ordinals(rows)), rows)


@pytest.mark.parametrize("name", available("fair.probe"))
def test_every_probe_gives_valid_rows_that_differ_and_repeats_itself(name, trained):
    probe = load("fair.probe", name)
    rows = census.split(600, 10)[0]
    domain = Domain.of(rows, [SEX], census.COLUMNS.domain)
    needs = getattr(probe, "NEEDS_DECODER", False)
    more = {"decoder": decoder.fit(rows, domain, epochs=2)} if needs else {}
    twice = [
        probe.draw(
            Answer(trained), rows, domain, SEX, 200, torch.Generator().manual_seed(3), **more
        )
        for _ in range(2)
    ]
    assert torch.equal(*twice) and len(twice[0]) > 50
    domain.ordinals(twice[0])  # raises for a row that is not valid
    assert len(SEX.unique(twice[0])) == len(twice[0])


def test_a_neighbour_differs_from_its_row_in_one_feature():
    rows = torch.tensor([[0, *(domain[0] for domain in census.COLUMNS.domain[1:])]])
    domain = Domain.of(rows, [SEX], census.COLUMNS.domain)
    draw = load("fair.probe", "neighbours").draw
    found = draw(None, rows, domain, SEX, 500, torch.Generator().manual_seed(0))
    assert ((found != rows).sum(1) == 1).all() and (found[:, SEX.position] == SEX.values[0]).all()
    assert len(found) == sum(census.SIZES[:-1]) - 6  # 500 draws reach all of 30


def test_the_boundary_of_a_linear_model_is_found():
    """Latents decoded by rounding, and a model that is a hyperplane: the normal is its own."""
    latent = load("fair.probe", "latent")
    normal = torch.tensor([0.6, 0.8])
    linear = SimpleNamespace(
        favourable=1, logits=lambda z: torch.stack([torch.zeros(len(z)), 4 * (z @ normal - 0.5)], 1)
    )
    z = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
    found, offset = latent.boundary(linear, SimpleNamespace(size=2, decode=lambda z: z), z)
    assert abs(float(found.norm()) - 1) < 1e-6
    assert float(found @ normal) > 0.99 and abs(offset + 0.5) < 0.05


def test_the_support_vector_machine_is_liblinears():
    svm = pytest.importorskip("sklearn.svm")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 4))
    y = np.where(x @ [1, -1, 0.5, 0] + rng.normal(size=300) > 0.3, 1.0, -1.0)
    weight, bias = load("fair.probe", "latent").svm(x, y)
    other = svm.LinearSVC(loss="squared_hinge", tol=1e-8, max_iter=100_000).fit(x, y)
    assert np.abs(weight - other.coef_[0]).max() < 1e-3 and abs(bias - other.intercept_[0]) < 1e-3


def test_a_model_that_is_sure_of_one_thing_has_no_boundary(trained):
    latent = load("fair.probe", "latent")
    sure = SimpleNamespace(
        favourable=1, logits=lambda z: torch.tensor([[0.0, 9.0]]).repeat(len(z), 1)
    )
    with pytest.raises(CalibrationError, match="leave the probe out"):
        latent.boundary(sure, SimpleNamespace(size=2, decode=lambda z: z), torch.randn(10, 2))


def test_the_decoder_learns_what_occurs():
    rows = census.split(3000, 10)[0]
    domain = Domain.of(rows, [SEX], census.COLUMNS.domain)
    made = decoder.fit(rows, domain, epochs=10)
    drawn = made.decode(torch.randn(3000, made.size, generator=torch.Generator().manual_seed(1)))
    race = [(own[:, 6] == domain.ids[6][0]).double().mean() for own in (rows, drawn, domain.all())]
    assert race[2] == 0.25 and race[1] > 0.6  # .75 of the rows: closer to them than to uniform


def test_columns_are_encoded_and_come_back(tmp_path):
    table = np.array([[0.1, 2], [5.0, 0], [9.0, 1], [9.0, 2]])
    columns = Columns.of(table, ["income", "kind"], numeric=["income"], bins=3)
    assert columns.sizes == (len(columns.edges["income"]) + 1, 3)
    rows = columns.encode(table)
    assert rows[:, 0].eq(0).all() and rows.max() < columns.vocabulary
    Domain.of(rows, [columns.attribute("kind")], columns.domain)
    assert columns.decode(rows)[:, 1].tolist() == [2, 0, 1, 2]
    assert columns.decode(rows)[0, 0] == 0 and columns.decode(rows)[3, 0] == columns.sizes[0] - 1
    columns.save(tmp_path)
    assert Columns.load(tmp_path) == columns
    (tmp_path / "x.csv").write_text("kind,label,income\n2,1,0.1\n1,0,9\n")
    read, labels = columns.read(tmp_path / "x.csv", "label")
    assert torch.equal(read, rows[[0, 2]]) and labels.tolist() == [1, 0]


def test_the_planted_bias_is_known_row_by_row():
    everyone = census.COLUMNS.decode(SEX.everyone(census.COLUMNS.encode(
        census.draw(500)[0])).flatten(0, 1)).numpy()  # fmt: skip
    odds = np.log(1 / (1 / census.probability(everyone) - 1)).reshape(-1, 2)
    married = everyone[::2, 2] == 1
    assert np.allclose(odds[:, 1] - odds[:, 0], census.SEX + census.SEX_MARRIED * married)


def test_retraining_asks_models_that_do_not_see_the_attribute(monkeypatch, trained):
    rows, labels, *_ = census.split(200, 10)
    seen = []
    module = __import__("qtk.fair.retrain", fromlist=["train"])
    real = module.train
    monkeypatch.setattr(module, "train", lambda m, r, y, **k: seen.append(r) or real(m, r, y, **k))
    found = rows[:7]
    model = retrain(trained, rows, labels, found, SEX, epochs=1, voters=3)
    *blind, last = seen
    assert len(blind) == 3 and all((own[:, SEX.position] == SEX.values[0]).all() for own in blind)
    assert len(last) == 260 and last[200:, SEX.position].unique().tolist() == list(SEX.values)
    assert {tuple(r) for r in SEX.unique(last[200:]).tolist()} <= {
        tuple(r) for r in SEX.unique(found).tolist()
    }
    assert type(model) is type(trained) and model is not trained


def test_swaps_go_both_ways_but_where_that_is_ambiguous():
    kept, other, places = swapped(
        ["He saw it", "she knows his son", "her film", "a film", "Man and women"], SWAPS
    )
    assert places == [0, 1, 4] and kept[0] == "He saw it"
    assert other == ["She saw it", "he knows her daughter", "Woman and men"]
    assert len(SWAPS) <= 30
    assert filled(["{who} acts", "none"], {"who": ["he", "she", "it"]}) == (
        ["he acts", "he acts"], ["she acts", "it acts"], [0, 0],
    )  # fmt: skip


def test_sentences_are_compared_with_their_counterparts(tiny_bert):
    from transformers import AutoTokenizer, BertForSequenceClassification

    torch.manual_seed(0)
    model = BertForSequenceClassification.from_pretrained(tiny_bert).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    texts = ["he is the man", "a film about a king and his son", "nothing here", "she sings"]
    found = qtk.fairness(model, model, texts, SWAPS, [0, 1, 1, 0], tokenizer)
    assert found.samples == 3 and found.wrong_p == 1
    shift = next(figure for figure in found.figures if figure.name == "mean |dp|")
    assert shift.on_float == shift.on_quantized > 0
    assert "counterparts" in found.table()
    with pytest.raises(CalibrationError, match="none of 1"):
        qtk.fairness(model, model, ["nothing here"], SWAPS, None, tokenizer)


def test_a_result_is_shown_in_every_form(trained, tmp_path):
    rows, labels = census.split(10, 200)[2:]
    qmodel = qtk.quantize(trained, w=4, a=4, calib=[{"input_ids": rows}], preset="fast",
                          progress=False)  # fmt: skip
    found = qtk.fairness(trained, qmodel, [{"input_ids": rows, "labels": labels}], SEX,
                         exhaustive=False, probe=["random"], n=100, progress=False)  # fmt: skip
    assert found.domain is None and {c.where for c in found.churn} == {"data"}
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    names = {figure["name"] for figure in data["figures"]}
    assert names == {"accuracy", "IF_o", "SPD", "DI", "EOD", "AOD", "|AOD|"}
    assert "no floor" in found.table() and "| sex | SPD |" in found.markdown()
    qtk.trust_page(found, tmp_path / "page.html")
    assert "disparate churn" in (tmp_path / "page.html").read_text()


def test_accuracy_counts_all_classes():
    decisions = [torch.tensor([0, 1, 2, 2]), torch.tensor([0, 2, 2, 1])]
    figure = Sides(decisions, 1, 0).accuracy(torch.tensor([0, 1, 2, 1]))
    assert (figure.on_float, figure.on_quantized) == (0.75, 0.75)


def test_what_cannot_be_compared_says_why(trained):
    rows, labels = census.split(10, 40)[2:]
    whole, ask = (
        census.COLUMNS.domain,
        lambda *args, **more: qtk.fairness(
            trained, trained, *args, **{"progress": False, "exhaustive": False, "probe": [], **more}
        ),
    )
    with pytest.raises(SchemeError, match="position 9, but rows have 8 tokens"):
        ask(rows, qtk.Attribute("sex", 9, [37, 38]))
    with pytest.raises(SchemeError, match="not in the domain of position 7"):
        ask(rows, qtk.Attribute("sex", 7, [1, 2]), domain=whole)
    with pytest.raises(SchemeError, match="name them all"):
        ask(rows, qtk.Attribute("race", 6, SIX[:2]), domain=whole)
    with pytest.raises(CalibrationError, match="need labels"):
        ask(rows, SEX, metrics=["EOD"])
    with pytest.raises(CalibrationError, match="give 40 class numbers"):
        ask(rows, SEX, labels[:-1])
    with pytest.raises(CalibrationError, match="2 classes"):
        ask(rows, SEX, labels + 1)
    with pytest.raises(CalibrationError, match="row 0 has token"):
        ask(rows.flip(1), SEX, domain=whole)
    with pytest.raises(SchemeError, match="no metric 'EER'"):
        ask(rows, SEX, metrics=["EER"])
    with pytest.raises(SchemeError, match="all different"):
        qtk.Attribute("sex", 7, [37])
    with pytest.raises(SchemeError, match="count from 0"):
        qtk.Attribute("sex", -1, [37, 38])
    with pytest.raises(SchemeError, match="no 'guess' in qtk/fair"):
        ask(rows, SEX, probe=["guess"])
    with pytest.raises(CalibrationError, match="padding"):
        ask({"input_ids": rows, "attention_mask": torch.zeros_like(rows)}, SEX)
    headless, _ = bert.tiny()
    with pytest.raises(ModelError, match="no classifier head"):
        qtk.fairness(headless, headless, rows, SEX)


SIX = census.COLUMNS.domain[6]


@pytest.mark.slow
def test_a_small_bert_stays_as_fair_as_it_was():
    """The figures that the whole study must reach, on one seed."""
    rows, labels, test, known = census.split()
    model = classifier.train(classifier.bert(census.COLUMNS), rows, labels)

    def quantized(bits, seed):
        chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:256]
        return qtk.quantize(model, w=bits, a=bits, calib=[{"input_ids": rows[chosen]}],
                            preset="fast", progress=False)  # fmt: skip

    for bits, limit in ((8, 0.003), (4, 0.02)):
        found = qtk.fairness(model, quantized(bits, 0), test, SEX, known, second=quantized(bits, 1),
                             domain=census.COLUMNS.domain, probe=["prior", "latent"],
                             progress=False)  # fmt: skip
        prior, latent, whole = found.instances
        assert (whole.became_unfair + whole.became_fair) / whole.tested < limit
        assert latent.found / latent.tested >= 1.3 * prior.found / prior.tested
