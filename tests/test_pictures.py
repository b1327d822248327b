"""Pictures of results: every label is inside the frame and covers nothing."""

from itertools import combinations

import pytest

pytest.importorskip("matplotlib")
from matplotlib import pyplot as plt

from benchmarks.result import read
from benchmarks.speed import cpu_plot


@pytest.fixture
def axes():
    figure, found = plt.subplots(figsize=(8, 5))
    found.set(xlim=(0, 3), ylim=(0, 1))
    yield found
    plt.close(figure)


def test_labels_stay_inside_and_apart_where_points_crowd(axes):
    places = {f"contender number {i}": (2.6 + 0.1 * i, 0.5 + 0.01 * i) for i in range(4)}
    cpu_plot.label(axes.figure, axes, places)
    frame = axes.get_window_extent()
    labels = [text for text in axes.texts if text.get_text()]  # the others are lines
    boxes = [text.get_window_extent() for text in labels]
    assert {text.get_text() for text in labels} == set(places)
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes)
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    dots = [axes.transData.transform(place) for place in places.values()]
    assert not any(box.contains(*dot) for box in boxes for dot in dots)


def test_a_label_that_has_no_room_is_an_error(axes):
    places = {f"contender number {i}": (1.5, 0.5) for i in range(30)}
    with pytest.raises(RuntimeError, match="no room"):
        cpu_plot.label(axes.figure, axes, places)


def test_the_picture_is_drawn_from_the_result_file(tmp_path):
    found = read("cpu_minilm")
    assert {name for name in found["cosine"] if name.startswith("qtk")} < set(
        cpu_plot.points(found)
    )
    cpu_plot.plot(found, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000
