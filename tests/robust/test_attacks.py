"""Every file in robust/attack: inside its budget, deterministic, and against an oracle."""

from collections import Counter
from functools import partial
from random import Random
from string import ascii_lowercase

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import nn

from qtk.discover import available, load
from qtk.errors import ModelError
from qtk.robust import ball
from qtk.robust.attack import _apgd, apgd_dlr, embedding_pgd, patch, square
from qtk.robust.images import Pixels, frozen
from qtk.robust.study import rounded

BUDGETS = {"linf": 8 / 255, "l2": 0.5, "l1": 5.0}
FOOLBOX = ("fgsm", "pgd_linf", "pgd_l2", "pgd_l1", "mim", "ddn")
PARTS = {name: load("robust.attack", name) for name in available("robust.attack")}
ON_PIXELS = [n for n, p in PARTS.items() if p.INPUT == "pixels" and p.NORM in BUDGETS]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def found(name, model, x, y, budget, seed=0, steps=5):
    if name in FOOLBOX:
        pytest.importorskip("foolbox")
    return PARTS[name].perturb(model, x, y, budget, generator(seed), steps)


class Linear(nn.Module):
    """Two classes of one difference: what an attack can reach is known by formula."""

    def __init__(self, n=48, classes=2):
        super().__init__()
        self.w = torch.randn(classes, n, generator=generator(1))
        self.eval()

    def forward(self, x):
        return x.flatten(1) @ self.w.T


@pytest.mark.parametrize("name", ON_PIXELS)
@pytest.mark.parametrize("which", [0, 1], ids=["float", "quantized"])
def test_an_attack_stays_inside_its_budget_and_is_deterministic(name, which, pair):
    model, x, y = Pixels(pair[which], (0.5,) * 3, (0.5,) * 3), pair[3][:6], pair[4][:6]
    norm, state = PARTS[name].NORM, torch.get_rng_state()
    with frozen(pair[which]):
        runs = [found(name, model, x, y, BUDGETS[norm]) for _ in range(2)]
    assert torch.equal(*runs)
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's random numbers are used up
    for image in (runs[0], rounded(runs[0], x)):
        assert image.shape == x.shape and image.min() >= 0 and image.max() <= 1
        allowed = BUDGETS[norm] * (1 + 1e-5) + 1e-6
        assert (ball.distance(image, x, norm) <= allowed).all()


@pytest.mark.parametrize(
    "name", [n for n in ON_PIXELS if PARTS[n].NORM == "linf" and n not in ("noise", "apgd_dlr")]
)
def test_of_a_linear_model_an_linf_attack_reaches_the_worst_case(name):
    """The margin falls by budget * |w_y - w_other|_1 at most, and all get nearly there."""
    model, x = Linear(), 0.5 + torch.zeros(4, 3, 4, 4)
    y = model(x).argmax(-1)
    budget = 0.05
    moved = found(name, model, x, y, budget, steps=40)
    fall = square.margin(model(x), y) - square.margin(model(moved), y)
    most = budget * (model.w[0] - model.w[1]).abs().sum()
    share = 0.6 if name == "square" else 0.98  # squares of many pixels, and few queries
    wrong = model(moved).argmax(-1) != y
    assert (wrong | (fall >= share * most)).all()
    assert (fall <= most * (1 + 1e-5)).all()


@pytest.mark.parametrize("name", ["pgd_l2", "ddn"])
def test_of_a_linear_model_an_l2_attack_needs_no_more_than_the_distance_to_the_boundary(name):
    model, x = Linear(), 0.5 + torch.zeros(1, 3, 4, 4)
    y = model(x).argmax(-1)
    way = (model.w[0] - model.w[1]).norm()
    needed = float(square.margin(model(x), y) / way)
    assert (model(found(name, model, x, y, 1.1 * needed, steps=60)).argmax(-1) != y).all()
    assert (model(found(name, model, x, y, 0.9 * needed, steps=60)).argmax(-1) == y).all()


def test_an_l1_attack_is_no_weaker_than_a_linear_models_gradient():
    """d = w_y - w_other: along d the margin falls by |d|_2^2 / |d|_1 of the budget; no way is
    better than along its largest number alone."""
    model, x = Linear(), 0.5 + torch.zeros(4, 3, 4, 4)
    y, budget = model(x).argmax(-1), 0.3
    moved = found("pgd_l1", model, x, y, budget, steps=40)
    fall = square.margin(model(x), y) - square.margin(model(moved), y)
    way = model.w[0] - model.w[1]
    assert (fall >= 0.95 * budget * way.square().sum() / way.abs().sum()).all()
    assert (fall <= budget * way.abs().max() * (1 + 1e-4)).all()


def test_noise_is_the_budget_up_or_down():
    x = torch.full((2, 3, 32, 32), 0.5)
    moved = (found("noise", None, x, None, 0.1) - x) / 0.1
    assert torch.allclose(moved.abs(), torch.ones_like(x), atol=1e-5)
    assert abs(float(moved.mean())) < 4 / x.numel() ** 0.5


def test_the_ratio_of_logits_is_the_papers():
    logits, y = torch.tensor([[5.0, 3, 1, 0], [1, 4, 2, 8]]), torch.tensor([0, 1])
    assert apgd_dlr.ratio(logits, y).tolist() == pytest.approx([-(5 - 3) / (5 - 1), -(4 - 8) / 6])
    scaled = apgd_dlr.ratio(1000 * logits, y)
    assert torch.allclose(scaled, apgd_dlr.ratio(logits, y))
    with pytest.raises(ModelError, match="three logits"):
        apgd_dlr.ratio(logits[:, :2], y)


def test_checkpoints_are_the_papers():
    assert sorted(_apgd.checkpoints(100))[:6] == [22, 41, 57, 70, 80, 87]


def test_more_steps_find_a_greater_loss(pair):
    model, x, y = Pixels(pair[0], (0.5,) * 3, (0.5,) * 3), pair[3], pair[4]
    loss_of = partial(ball.cross_entropy, y=y)
    with frozen(pair[0]):
        losses = [
            loss_of(model(_apgd.ascend(model, x, y, 0.02, generator(), n, loss_of))).mean()
            for n in (1, 5, 25)
        ]
    assert losses[0] < losses[1] < losses[2] * 1.001


def test_apgd_and_square_are_as_strong_as_torchattacks(pair):
    torchattacks = pytest.importorskip("torchattacks")
    model, x, y = Pixels(pair[0], (0.5,) * 3, (0.5,) * 3), pair[3], pair[4]
    budget = 0.02
    theirs = {
        "apgd_ce": torchattacks.APGD(model, eps=budget, steps=20, loss="ce"),
        "apgd_dlr": torchattacks.APGD(model, eps=budget, steps=20, loss="dlr"),
        "square": torchattacks.Square(model, eps=budget, n_queries=200),
    }
    with frozen(pair[0]):
        for name, attack in theirs.items():
            own, other = (
                float((model(z).argmax(-1) == y).float().mean())
                for z in (found(name, model, x, y, budget, steps=20), attack(x, y))
            )
            assert abs(own - other) <= max(0.02, 2 / len(x)), name


def test_squares_shrink_as_the_papers_schedule_says():
    sides = [square.side_at(q, 10_000, 32) for q in (0, 11, 51, 201, 1001, 8001)]
    assert sides == [29, 20, 14, 10, 5, 1]  # (.8 / 2**k) ** .5 of 32


def test_a_patch_changes_one_square_and_learns_to_mislead():
    model = Linear(classes=3)
    x = torch.rand(32, 3, 4, 4, generator=generator(2))
    y = model(x).argmax(-1)
    learned = patch.learn(model, x, y, 0.5, generator(), 60)
    assert learned.shape == (3, 2, 2) and learned.min() >= 0 and learned.max() <= 1
    shown = patch.apply(learned, x, generator(3))
    assert ((shown != x).any(1).flatten(1).sum(1) <= 4).all()
    blank = patch.apply(torch.full_like(learned, 0.5), x, generator(3))
    right = [(model(z).argmax(-1) == y).float().mean() for z in (shown, blank)]
    assert right[0] < right[1]


def test_a_patch_s_first_step_follows_the_gradient_of_a_plain_loop():
    """Adam's first step is its rate along the gradient's sign, here of finite differences."""
    model, x, y = Linear(classes=3), torch.rand(5, 3, 4, 4, generator=generator(2)), [0, 1, 2, 0, 1]
    w, images = model.w.double().numpy(), x.double().numpy()
    learned = patch.learn(model, x, torch.tensor(y), 0.5, generator(), 1)
    drawn = generator()  # again what the attack draws: pixels, images, tops, lefts
    start = torch.rand(3, 2, 2, generator=drawn).double().numpy()
    chosen = torch.randint(0, 5, (40,), generator=drawn).tolist()
    tops, lefts = (torch.randint(0, 3, (8,), generator=drawn).tolist() for _ in range(2))

    def loss(square: np.ndarray) -> float:
        found = []
        for turn, i in enumerate(chosen):
            top, left = tops[turn % 8], lefts[turn % 8]
            image = images[i].copy()
            for row in range(2):
                for column in range(2):
                    image[:, top + row, left + column] = square[:, row, column]
            logits = w @ image.ravel()
            found.append(np.log(np.exp(logits - logits[y[i]]).sum()))
        rough = abs(square[:, :, 1] - square[:, :, 0]).mean()
        rough += abs(square[:, 1] - square[:, 0]).mean()
        return float(patch.SMOOTH * rough - np.mean(found))

    for at in np.ndindex(start.shape):
        up, down = start.copy(), start.copy()
        up[at] += 1e-6
        down[at] -= 1e-6
        slope = (loss(up) - loss(down)) / 2e-6
        expected = np.clip(start[at] - patch.RATE * np.sign(slope), 0, 1)
        assert abs(slope) > 1e-4 and abs(float(learned[at]) - expected) < 1e-4


def test_every_token_stays_in_its_ball():
    x = torch.randn(2, 5, 48, generator=generator(1))
    y = torch.tensor([0, 1])

    class Mean(Linear):
        def forward(self, x):
            return x.mean(1) @ self.w.T

    model = Mean()
    moved = embedding_pgd.perturb(model, x, y, 0.3, generator(), 8)
    radius = 0.3 * x.norm(dim=-1).mean()
    assert ((moved - x).norm(dim=-1) <= radius * (1 + 1e-5)).all()
    # of a linear model the best direction is known: along w_other - w_y, by the radius
    fall = square.margin(model(x), y) - square.margin(model(moved), y)
    assert torch.allclose(fall, (radius * (model.w[0] - model.w[1]).norm()).expand(2), rtol=0.02)


@pytest.mark.parametrize("name", ["character_noise", "word_noise"])
def test_noise_of_text_changes_its_share_of_words_and_repeats_itself(name):
    text = "a film that is charming and true to its own strange heart"
    part, words = PARTS[name], len(text.split())
    once, again = (part.disturb(text, 0.3, Random(4)) for _ in range(2))
    assert once == again != text
    changed = once.split(" ")
    if name == "character_noise":
        differing = [a != b for a, b in zip(text.split(), changed, strict=True)]
        assert sum(differing) == -(-3 * words // 10)
        assert all(abs(len(a) - len(b)) <= 1 for a, b in zip(text.split(), changed, strict=True))
    else:
        assert set(changed) <= set(text.split()) and abs(len(changed) - words) <= 4
    assert part.disturb("word", 0.0, Random(0)) == "word"


def frequencies(found: Counter[str], shares: dict[str, float]) -> float:
    """p of the chi-square test that draws have those shares; nothing else may be among them."""
    assert set(found) <= set(shares) and sum(shares.values()) == pytest.approx(1)
    n = found.total()
    return float(chisquare([found[k] for k in shares], [n * v for v in shares.values()]).pvalue)


def test_typing_errors_are_those_of_the_definition_and_as_frequent():
    """Every error that "free" can have; p is below 1e-6 by chance once in a million."""
    shares: Counter[str] = Counter()
    for at in range(3):  # uniformly, never the last letter
        lost, doubled = "free"[:at] + "free"[at + 1 :], "free"[:at] + "free"[at] + "free"[at:]
        replaced = ["free"[:at] + c + "free"[at + 1 :] for c in ascii_lowercase if c != "free"[at]]
        swapped = {0: "rfee", 1: "fere"}.get(at)  # two equal letters are replaced instead
        shares[lost] += 1 / 12
        shares[doubled] += 1 / 12
        for word in replaced:
            shares[word] += (1 + (swapped is None)) / 12 / 25
        if swapped:
            shares[swapped] += 1 / 12
    found = Counter(
        PARTS["character_noise"].disturb("free", 1.0, Random(seed)) for seed in range(20_000)
    )
    assert frequencies(found, dict(shares)) > 1e-6
    which = Counter(
        "".join("01"[a != b] for a, b in zip(("film", "a", "good", "true"), words, strict=True))
        for words in (
            PARTS["character_noise"].disturb("film a good true", 0.5, Random(seed)).split(" ")
            for seed in range(3000)
        )
    )  # two of the three words that have two letters
    assert frequencies(which, dict.fromkeys(("1010", "1001", "0011"), 1 / 3)) > 1e-6


def test_lost_repeated_and_swapped_words_are_those_of_the_definition_and_as_frequent():
    """Places from the last to the first, each with one of three changes, equally often."""
    one = ["b a c", "a c b", "b c", "a c", "a a b c", "a b b c"]
    found = Counter(PARTS["word_noise"].disturb("a b c", 0.3, Random(s)) for s in range(3000))
    assert frequencies(found, dict.fromkeys(one, 1 / 6)) > 1e-6
    second = {"a c b": ["c a b", "c b", "a a c b"], "a c": ["c a", "c", "a a c"],
              "a b b c": ["b a b c", "b b c", "a a b b c"]}  # fmt: skip
    two = [text for texts in second.values() for text in texts]
    found = Counter(PARTS["word_noise"].disturb("a b c", 0.6, Random(s)) for s in range(3000))
    assert frequencies(found, dict.fromkeys(two, 1 / 9)) > 1e-6
