"""Results of all studies on one page."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import qtk
from qtk.fair.result import Churn, Fairness
from qtk.physical.exposure import Exposed, exposure
from qtk.physical.front import Naturalness, Point
from qtk.robust.result import Robustness, compare
from qtk.security.audit import Audit
from qtk.security.evidence import Evidence
from qtk.security.theft import Row, Theft

N = 40


def shares(*values):
    return [(np.arange(N) < round(value * N)) for value in values]


def fairness():
    churn = Churn("sex", "all", "data", N, 3, 1, 2, 0.02, 0.2, 1.0)
    return Fairness(N, None, 0, (), (), (churn,), (), None, (0, 0), 1.0)


def theft():
    row = Row("knockoff", "in", "soft", "float", 0.9, (0.8,), 0.8, 0.8, 10, 30, 1.0)
    return Theft((row,), N, (0,), 1.0)


def audit():
    return Audit((Evidence("directions", 0.1, 0.2, "few <ties>", {"ties": [1.0, 2.0]}),), 8, N, 0)


def robustness():
    pair = tuple(each.astype(np.int8) for each in shares(0.9, 0.8))
    return Robustness(N, 0, "none", ("fog",), (compare("clean", "clean", "", None, pair, pair, 0),))


def xray():
    kinds = (("clean", "-", 0.9, 0.9), ("balls, random places", "-", 0.8, 0.8),
             *((name, own, share, share) for own in ("float", "quantized")
               for name, share in (("discs", 0.6), ("balls", 0.7), ("shaped", 0.5))))  # fmt: skip
    seen = [Exposed(name, own, np.stack(shares(a, b)), 0.1) for name, own, a, b in kinds]
    return exposure(seen, {}, torch.zeros(0, 3), torch.rand(5, 2, 3, 8, 8), "iron", 0, 1.0)


def naturalness():
    point = Point("mean colour", 0.0, 1, N, 2, N, 4.0, 4.0, 4.0)
    return Naturalness((point,), (), (), torch.rand(1, 2, 3, 8, 8), N, 4, 0, 1.0)


STUDIES = (robustness, fairness, theft, audit, xray, naturalness)


def test_every_result_has_a_section_whatever_the_file(tmp_path):
    pytest.importorskip("matplotlib")
    results = [study() for study in STUDIES]
    for ending in ("html", "md", "json"):
        qtk.trust_page(results, tmp_path / "out" / f"trust.{ending}")
    page, text, told = (
        (tmp_path / "out" / f"trust.{ending}").read_text() for ending in ("html", "md", "json")
    )
    titles = [result.title for result in results]
    assert len(set(titles)) == len(titles) and list(json.loads(told)) == titles
    for title in titles:
        assert f"<h2>{title}</h2>" in page and f"\n## {title}\n" in text
    assert page.count("<section>") == len(results) and "<script" not in page
    assert page.count("data:image/png") == 2 and "few &lt;ties&gt;" in page
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_titles_are_given_or_counted(tmp_path):
    qtk.trust_page({"W4A4 <b>": fairness()}, tmp_path / "named.html")
    assert "<h2>W4A4 &lt;b&gt;</h2>" in (tmp_path / "named.html").read_text()
    other = replace(fairness(), seed=1)
    qtk.trust_page([fairness(), other, theft()], tmp_path / "two.json")
    told = json.loads((tmp_path / "two.json").read_text())
    assert list(told) == ["Fairness", "Fairness 2", "Stealing"] and told["Fairness 2"]["seed"] == 1
    qtk.trust_page(theft(), tmp_path / "one.md")
    assert (tmp_path / "one.md").read_text().count("\n## ") == 1


def test_a_page_of_nothing_or_of_another_kind_is_refused(tmp_path):
    with pytest.raises(qtk.SchemeError, match=r"0 of them to page\.html"):
        qtk.trust_page([], tmp_path / "page.html")
    with pytest.raises(qtk.SchemeError, match=r"ends in \.html, \.md, \.json"):
        qtk.trust_page(theft(), tmp_path / "page.pdf")


def test_effects_are_differences_on_the_same_scenes():
    found = {(e.name, e.crafted): e for e in xray().effects}
    assert abs(found["placement", "float"].value - 0.1) < 1e-9
    assert abs(found["shape", "quantized"].value - 0.2) < 1e-9
    kept = found["kept", "float"]
    assert (kept.value, kept.low, kept.high, kept.reader) == (1, 1, 1, "quantized")
    assert found["shape", "float"].low <= 0.2 <= found["shape", "float"].high
