"""How numbers and names are written."""

from __future__ import annotations

import matplotlib
import pytest

from der_fast.report import style


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0, "0"),
        (999, "999"),
        (1000, "1.00 k"),
        (464_154, "464 k"),
        (999_600, "1.00 M"),
        (11_220_132, "11.2 M"),
        (2.856e8, "286 M"),
    ],
)
def test_count(value, text):
    assert style.count(value) == text


def test_count_tick_has_no_needless_zeros():
    assert [style.count_tick(value) for value in (0, 5e5, 1e6, 1.5e6, 2e7)] == ["0", "500 k", "1 M", "1.5 M", "20 M"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "–"), (0.42, "0.4 s"), (48.2, "48 s"), (59.7, "1 min 00 s"), (185, "3 min 05 s"), (7620, "2 h 07 min")]
)
def test_duration(seconds, text):
    assert style.duration(seconds) == text


def test_share_signed_plural():
    assert [style.share(81, 1000), style.share(1, 4), style.share(None, 4), style.share(1, None)] == ["8.1 %", "25 %", "–", "–"]
    assert [style.signed(-1.25, 2), style.signed(0.5), style.signed(None)] == ["−1.25", "+0.5", "–"]
    assert [style.plural(1, "step"), style.plural(2, "class", "es")] == ["1 step", "2 classes"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("cat", "cat"),
        ("a\nb\tc", "a b c"),
        ("a long name, number 3", "a long n…umber 3"),
        ("猫", "class 7"),
        ("", "class 7"),
        ("\ud800", "class 7"),
        ("$x$", "$x$"),
    ],
)
def test_label_is_drawable(name, text):
    assert style.label(name, 6) == text


@pytest.mark.parametrize(("steps", "ticks"), [(1, [1]), (5, [1, 2, 3, 4, 5]), (25, list(range(1, 26, 2))), (50, [1, *range(5, 51, 5)])])
def test_step_ticks(steps, ticks):
    assert style.step_ticks(steps, most=20) == ticks


def test_class_set_label():
    assert style.class_set_label(2, ["cat", "dog"], 2) == "2: cat, dog"
    assert style.class_set_label(2, [f"class_{index}" for index in range(10)], 10) == "2: 10 classes"


def test_look_leaves_matplotlib_as_it_was():
    before = dict(matplotlib.rcParams)
    with style.look():
        assert matplotlib.rcParams["text.parse_math"] is False
    assert dict(matplotlib.rcParams) == before


def test_a_latency_has_its_spread_and_is_never_negative():
    assert style.timed(2.345, 0.021) == "2.35 ± 0.02"
    assert style.timed(0.01, 0.3) == "< 0.3"
    assert style.timed(2.0, None) == style.timed(2.0, 0.0) == "2"
    # The difference of two measurements of an older version: noise.
    assert style.timed(-2.18, None) == "–"
    assert style.timed(None, None) == "–"
