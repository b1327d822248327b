"""Plain English sentences, put together from parts, for when there is no text to calibrate on.

They are simple, but not all alike: statements, questions and reports of 4 to 40 words on a dozen
subjects, so that the ranges seen are those of ordinary text.
"""

import random

PEOPLE = (
    "a woman", "two children", "the old sailor", "my neighbour", "the committee", "a young doctor",
    "the engineers", "an angry customer", "the whole village", "her brother", "a group of tourists",
    "the night guard", "nobody", "the mayor of the town", "a violin player", "our teacher",
    "the research team", "a farmer with three dogs", "the goalkeeper", "an unknown author",
)  # fmt: skip
ACTIONS = (
    "repaired a bicycle", "sold the house", "wrote a long letter", "lost the keys",
    "will open a bakery", "counted the votes twice", "cooked soup with too much salt",
    "painted the kitchen wall green", "missed the last train", "won the second match",
    "signed the agreement", "slept under a tree", "measured the temperature of the lake",
    "cut the onions", "climbed over the fence", "ordered forty chairs", "explained the new law",
    "rode a horse", "closed the bank account", "planted tomatoes", "switched off the server",
)  # fmt: skip
PLACES = (
    "in the harbour", "behind the school", "on the roof", "at the airport", "near the river",
    "in a small office", "on the beach", "in northern Norway", "at the market", "under the bridge",
    "in the hospital", "along the border", "in front of the theatre", "on an island", "in Lisbon",
)  # fmt: skip
TIMES = (
    "yesterday", "early in the morning", "in 1987", "every Tuesday", "after the storm",
    "before lunch", "during the strike", "last winter", "at 5:30 pm", "once again", "for no reason",
    "three weeks ago", "while it was raining",
)  # fmt: skip
THINGS = (
    "the price of copper", "unemployment", "the water level", "the number of visitors",
    "the company's profit", "traffic in the centre", "the demand for electric cars", "rainfall",
    "the share of women in parliament", "the cost of bread", "energy use", "the error rate",
)  # fmt: skip
CHANGES = (
    "fell by 12 percent", "has doubled", "rose slightly", "stayed the same", "is hard to predict",
    "reached a record", "dropped to $4.20", "was higher than expected", "will decline",
    "recovered quickly",
)  # fmt: skip
TOPICS = (
    "the brain", "a black hole", "inflation", "vaccines", "chess openings", "medieval castles",
    "solar panels", "jazz", "coral reefs", "the Python language", "tax law", "bread baking",
    "volcanoes", "football", "the moon", "antique clocks", "bees", "poetry",
)  # fmt: skip
QUALITIES = (
    "old", "surprisingly cheap", "broken", "too loud", "beautiful", "out of date", "dangerous",
    "made of glass", "almost finished", "bigger than it looks", "difficult to explain", "free",
)  # fmt: skip
TEMPLATES = (
    "{Person} {action}.",
    "{Person} {action} {place}.",
    "{Time}, {person} {action} {place}.",
    "{Person} {action} {time}, and {person2} {action2} {place}.",
    "{Thing} {change} {time}.",
    "{Thing} {change}, although {thing2} {change2}.",
    "According to the report, {thing} {change}; experts say that {thing2} {change2} as well.",
    "How does {topic} work?",
    "What is the best book about {topic} for someone who knows nothing about {topic2}?",
    "I never thought that {topic} could be {quality}.",
    "{Topic} and {topic2}: a short introduction",
    "Is it true that {person} {action} {place}?",
    "The machine {place} is {quality}, {quality2} and {quality3}.",
    "No, {person} did not say anything about {topic} {time}!",
    "\"It is {quality},\" said {person}, \"but {thing} {change} and we have to think of {topic}.\"",
    "{Topic}",
    "please tell me why my code for {topic} is {quality}",
    "Although {person} {action} {time}, {person2} believes that {topic} is {quality}, that {thing} "
    "{change}, and that {topic2} will be {quality2} by the end of the year.",
)  # fmt: skip
PARTS = {
    "person": PEOPLE,
    "action": ACTIONS,
    "place": PLACES,
    "time": TIMES,
    "thing": THINGS,
    "change": CHANGES,
    "topic": TOPICS,
    "quality": QUALITIES,
}


def sentences(n: int, seed: int = 0) -> list[str]:
    """n distinct sentences; those of a larger n begin with those of a smaller one."""
    rng = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < n:
        found.setdefault(_sentence(rng))
    return list(found)


def split(calibration: int, evaluation: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """Two lists of sentences that share none."""
    every = sentences(calibration + evaluation, seed)
    return every[:calibration], every[calibration:]


def _sentence(rng: random.Random) -> str:
    words = {}
    for name, choices in PARTS.items():
        for suffix, word in zip(("", "2", "3"), rng.sample(choices, 3), strict=True):
            words[name + suffix] = word
            words[name.capitalize() + suffix] = word[0].upper() + word[1:]
    return rng.choice(TEMPLATES).format(**words)
