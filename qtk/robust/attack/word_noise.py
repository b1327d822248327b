"""Words lost, repeated and swapped with their neighbour, in a share of the places (the random
deletion and swap of Wei and Zou 2019, arXiv 1901.11196)."""

from random import Random

INPUT, NORM, GRADIENTS = "text", "rate", False


def disturb(text: str, budget: float, random: Random) -> str:
    """`text` changed at up to `budget` of its words, rounded up; a single word stays."""
    words = text.split(" ")
    count = min(len(words) - 1, -int(-budget * len(words) // 1))
    for i in sorted(random.sample(range(len(words) - 1), count), reverse=True):
        kind = random.randrange(3)
        if kind == 0:
            words[i], words[i + 1] = words[i + 1], words[i]
        elif kind == 1:
            del words[i]
        else:
            words.insert(i, words[i])
    return " ".join(words)
