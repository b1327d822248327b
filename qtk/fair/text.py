"""Sentences and their counterparts: he for she, John for Mary; the decision must not change."""

import json
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtk.errors import CalibrationError, SchemeError
from qtk.fair.answer import Answer, check_labels, decide, ties
from qtk.fair.result import Fairness
from qtk.fair.sides import Sides, floor_of
from qtk.intervals import Figure
from qtk.observe.tokens import encode, find_tokenizer

# Word -> counterpart. "her" answers to "his" and to "him": sentences with it are left out.
SWAPS = {
    "he": "she", "his": "her", "him": "her", "himself": "herself",
    "man": "woman", "men": "women", "boy": "girl", "boys": "girls",
    "actor": "actress", "actors": "actresses", "hero": "heroine", "heroes": "heroines",
    "father": "mother", "son": "daughter", "brother": "sister", "husband": "wife",
    "king": "queen", "prince": "princess", "uncle": "aunt", "nephew": "niece",
    "john": "mary", "michael": "jennifer", "david": "sarah", "james": "emma",
    "robert": "susan", "peter": "anna", "tom": "kate", "paul": "laura",
    "male": "female", "guy": "gal",
}  # fmt: skip
WORD = re.compile(r"[A-Za-z]+")
Pairs = tuple[list[str], list[str], list[int]]


def read_swaps(file: Path | None) -> dict[str, str]:
    """Of a JSON file {word: counterpart}; `SWAPS` for None.

    Raises:
        CalibrationError: not such a file.
    """
    if file is None:
        return SWAPS
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CalibrationError(f"{file} is not JSON: {error}") from None
    if not isinstance(held, dict) or not all(isinstance(word, str) for word in held.values()):
        raise CalibrationError(f"{file} is not {{word: counterpart}}")
    return held


def swapped(sentences: Sequence[str], swaps: Mapping[str, str]) -> Pairs:
    """Sentences with a word of the swaps, their counterparts, and where each stood.

    All such words of a sentence are swapped, both ways. A word that several others answer to cannot
    be swapped back: a sentence with one is left out.
    """
    swaps = {one.lower(): other.lower() for one, other in swaps.items()}
    answers = Counter(swaps.values())
    both = {other: one for one, other in swaps.items()} | swaps
    ambiguous = {word for word, number in answers.items() if number > 1 and word not in swaps}
    kept, other, places = [], [], []
    for place, sentence in enumerate(sentences):
        words = {word.lower() for word in WORD.findall(sentence)}
        if words & both.keys() and not words & ambiguous:
            kept.append(sentence)
            other.append(WORD.sub(lambda found: _like(found[0], both), sentence))
            places.append(place)
    return kept, other, places


def filled(templates: Sequence[str], values: Mapping[str, Sequence[str]]) -> Pairs:
    """Templates with the first value, and with each other one: "{who} is a fine actor".

    Raises:
        SchemeError: a value list with fewer than two entries, or several placeholders.
    """
    words: list[str] = [word for each in values.values() for word in each]
    if len(values) != 1 or len(words) < 2:
        raise SchemeError("templates have one placeholder with two values or more")
    mark = "{" + next(iter(values)) + "}"
    kept, other, places = [], [], []
    for place, template in enumerate(templates):
        for word in words[1:] if mark in template else ():
            kept.append(template.replace(mark, words[0]))
            other.append(template.replace(mark, word))
            places.append(place)
    return kept, other, places


def compare(
    answers: Sequence[Answer], sentences: Any, protected: Mapping[str, Any], labels: Any,
    tokenizer: Any, seed: int, start: float,
) -> Fairness:  # fmt: skip
    """`qtk.fairness` of sentences.

    Raises:
        CalibrationError: no sentences, none with a counterpart, or no tokenizer beside the model.
    """
    if isinstance(sentences, str) or not all(isinstance(one, str) for one in sentences):
        raise CalibrationError("swaps and templates are for sentences: give a list of strings")
    tokenizer = find_tokenizer(answers[0].model, tokenizer)
    plain = all(isinstance(value, str) for value in protected.values())
    kept, other, places = (swapped if plain else filled)(sentences, protected)
    if not kept:
        raise CalibrationError(f"none of {len(sentences)} sentences has a word of `protected`")
    given = check_labels(labels, len(sentences))
    before = [_ask(answer, kept, tokenizer) for answer in answers]
    after = [_ask(answer, other, tokenizer) for answer in answers]
    sides = Sides([decide(each) for each in before], answers[0].favourable, seed)
    name = "swaps" if plain else "templates"
    flips = [decide(a) != decide(b) for a, b in zip(before, after, strict=True)]
    figures = [sides.share(name, "counterfactual flips", flips), _shift(name, answers, before,
               after)]  # fmt: skip
    own = None if given is None else given[places]
    if own is not None:
        figures.insert(0, sides.accuracy(own))
    everyone = torch.ones(len(kept), dtype=torch.bool)
    counterparts = Sides([decide(each) for each in after], answers[0].favourable, seed)
    churn = (sides.churn("", "as they are", "data", everyone),
             counterparts.churn("", "counterparts", "data", everyone),
             Sides([each.long() for each in flips], 1, seed).churn(name, "flips", "data",
                                                                   everyone))  # fmt: skip
    return Fairness(
        samples=len(kept), domain=None, seed=seed, figures=tuple(figures), instances=(),
        churn=churn, disparities=(), wrong_p=None if own is None else sides.wrong_p(own),
        ties=(ties(before[0]), ties(before[1])), seconds=time.perf_counter() - start,
    )  # fmt: skip


def _shift(
    name: str, answers: Sequence[Answer], before: Sequence[Tensor], after: Sequence[Tensor]
) -> Figure:
    """Mean absolute change of the favourable class's probability, and its interval."""
    chosen = answers[0].favourable
    moved = [
        (b.softmax(1) - a.softmax(1))[:, chosen].abs().double()
        for a, b in zip(before, after, strict=True)
    ]
    values = [float(each.mean()) for each in moved]
    difference = moved[1] - moved[0]
    half = 1.96 * float(difference.std()) / len(difference) ** 0.5 if len(difference) > 1 else 0.0
    center = values[1] - values[0]
    return Figure("mean |dp|", values[0], values[1], center - half, center + half,
                  floor_of(values), name)  # fmt: skip


def _ask(answer: Answer, sentences: Sequence[str], tokenizer: Any) -> Tensor:
    """Logits [N, C], sentences of like length together."""
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    found = []
    for start in range(0, len(order), 64):
        part = [sentences[i] for i in order[start : start + 64]]
        found.append(answer.ask(encode(answer.model, tokenizer, part)))
    back = torch.empty(len(order), dtype=torch.long)
    back[order] = torch.arange(len(order))
    return torch.cat(found)[back]


def _like(word: str, swaps: Mapping[str, str]) -> str:
    """The counterpart, with a capital where the word has one; other words as they are."""
    other = swaps.get(word.lower(), word)
    return other.capitalize() if other != word and word[0].isupper() else other
