"""Results as text and as JSON."""

import json
import math

from qtk.table import finite, listed, ruled


def test_numbers_stand_to_the_right_under_a_ruled_head() -> None:
    lines = ruled(["name", "n"], [["a", "1"], ["b", "100"], ["c", "-"]])
    assert lines == ["name    n", "----  ---", "a       1", "b     100", "c       -"]


def test_a_head_alone_is_a_table() -> None:
    assert ruled(["a", "bc"], []) == ["a  bc", "-  --"]


def test_names_and_values_line_up() -> None:
    assert listed([("a", "1"), ("long", "2 dB")]) == ["a     1", "long  2 dB"]
    assert listed([]) == []


def test_json_has_no_infinity() -> None:
    data = finite({"a": [1.5, math.inf, (math.nan, "x")], "b": {"c": -math.inf, "d": None}})
    assert data == {"a": [1.5, None, [None, "x"]], "b": {"c": None, "d": None}}
    json.dumps(data, allow_nan=False)
