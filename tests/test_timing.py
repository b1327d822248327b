"""The timer."""

import pytest

from qtk.timing import ENOUGH, hardware, race


def test_every_call_is_made_once_in_every_round() -> None:
    made: list[str] = []
    times = race({name: lambda n=name: made.append(n) for name in "ab"}, rounds=3, warmup=1)  # type: ignore[misc]
    assert made == list("ab" * 4)
    assert set(times) == {"a", "b"} and all(seconds >= 0 for seconds in times.values())


def test_a_slow_race_ends_early() -> None:
    made: list[int] = []
    race({"slow": lambda: made.append(1)}, rounds=50, warmup=1, limit=0.0)
    assert len(made) == 1 + ENOUGH


def test_a_round_that_a_noise_disturbs_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, *(t for i in range(5) for t in (10.0 * i, 10.0 * i + (9 if i == 2 else 1)))])
    monkeypatch.setattr("qtk.timing.time.perf_counter", lambda: next(clock))
    assert race({"a": lambda: None}, rounds=5, warmup=0) == {"a": 1.0}


def test_hardware_is_named() -> None:
    assert hardware()["cpu"] and hardware()["threads"] >= 1
