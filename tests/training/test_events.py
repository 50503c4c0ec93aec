from __future__ import annotations

import pytest

from der_fast.training.events import FORGOTTEN, REFRESHED, RENAMED, Event, from_json, known_of, names_now, names_then, rows_of, to_json

EVENTS = [
    Event(RENAMED, 1, ("a", "b")),
    Event(REFRESHED, 1, ("b",), 3),
    Event(RENAMED, 2, ("b", "c")),
    Event(FORGOTTEN, 2, ("x", "y")),
]


def test_names_are_followed() -> None:
    assert names_now(EVENTS) == {"a": "c", "x": None, "y": None}
    assert names_then(["c", "z"], EVENTS) == ["a", "z"]
    assert names_now([*EVENTS, Event(FORGOTTEN, 3, ("c",))]) == {"a": None, "x": None, "y": None}


def test_a_name_that_was_freed_stands_for_the_earlier_class() -> None:
    # "a" was learned again after it had been renamed, and then renamed itself.
    assert names_now([*EVENTS, Event(RENAMED, 3, ("a", "d"))]) == {"a": "c", "x": None, "y": None}
    # "x" was learned again after it had been forgotten.
    assert names_now([*EVENTS, Event(RENAMED, 3, ("x", "d"))])["x"] == "d"


@pytest.mark.parametrize(
    ("known", "found"),
    [
        ("cz", {"a": "c", "z": "z"}),
        # Learned again under its old name.
        ("cx", {"a": "c", "x": "x"}),
        ("z", {"z": "z"}),
    ],
)
def test_known_classes_of_the_own_data_set(known: str, found: dict[str, str]) -> None:
    assert known_of("acxyz", list(known), EVENTS) == found


def test_there_and_back() -> None:
    assert from_json(to_json(EVENTS)) == EVENTS
    assert [row["kind"] for row in rows_of(EVENTS)] == [RENAMED, REFRESHED, RENAMED, FORGOTTEN]
    assert rows_of(EVENTS)[1]["top1"] is None
