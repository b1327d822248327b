"""Typing errors: in a share of the words two neighbouring letters swap, or one that is not the last
is left out, doubled, or replaced (Belinkov and Bisk 2018, arXiv 1711.02173)."""

from random import Random
from string import ascii_lowercase

INPUT, NORM, GRADIENTS = "text", "rate", False


def disturb(text: str, budget: float, random: Random) -> str:
    """`text` with errors in `budget` of its words, rounded up, where a word has two letters."""
    words = text.split(" ")
    eligible = [i for i, word in enumerate(words) if len(word) > 1]
    count = min(len(eligible), -int(-budget * len(words) // 1))
    for i in random.sample(eligible, count):
        words[i] = _mistyped(words[i], random)
    return " ".join(words)


def _mistyped(word: str, random: Random) -> str:
    at, kind = random.randrange(len(word) - 1), random.randrange(4)
    if kind == 0 and word[at] != word[at + 1]:
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    if kind == 1:
        return word[:at] + word[at + 1 :]
    if kind == 2:
        return word[: at + 1] + word[at:]
    other = random.choice([letter for letter in ascii_lowercase if letter != word[at]])
    return word[:at] + other + word[at + 1 :]
