"""What happened to a learner's classes between its steps: refreshed, renamed, forgotten. It is saved with the run."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from der_fast.training.figures import EVENT, names_for
from der_fast.training.results import StepResult

REFRESHED, RENAMED, FORGOTTEN = "refreshed", "renamed", "forgotten"


@dataclass(frozen=True)
class Event:
    """One change of known classes.

    Attributes:
        kind: REFRESHED, RENAMED or FORGOTTEN.
        step: number of steps learned before it.
        class_names: the classes; for a rename the old and the new name.
        images: number of new images in a refresh; else None.
        result: what was measured afterwards; None if the event changes nothing measurable.
    """

    kind: str
    step: int
    class_names: tuple[str, ...]
    images: int | None = None
    result: StepResult | None = None


def to_json(events: Iterable[Event]) -> list[dict[str, Any]]:
    """Turn events into plain JSON values."""
    return [{**vars(event), "result": None if event.result is None else event.result.to_json()} for event in events]


def from_json(rows: Iterable[Mapping[str, Any]]) -> list[Event]:
    """The inverse of `to_json`; raises KeyError or TypeError if something is missing or invalid."""
    events = []
    for row in rows:
        result = None if row["result"] is None else StepResult.from_json(row["result"])
        events.append(Event(row["kind"], row["step"], tuple(row["class_names"]), row["images"], result))
    return events


def rows_of(events: Iterable[Event]) -> list[dict[str, Any]]:
    """Return the events as ``metrics.json`` holds them: kind, step, classes and the figures measured afterwards."""
    return [
        {
            "kind": event.kind,
            "step": event.step,
            "class_names": list(event.class_names),
            "images": event.images,
            **{name: None if event.result is None else getattr(event.result, name) for name in names_for(EVENT)},
        }
        for event in events
    ]


def latest(results: Sequence[StepResult], events: Sequence[Event]) -> StepResult:
    """Return the last measurement: after the last step, or after a later event."""
    since = [event.result for event in events if event.step == len(results) and event.result is not None]
    return since[-1] if since else results[-1]


def with_names(events: Iterable[Event], names: Mapping[str, str | None]) -> list[Event]:
    """Return the events with refreshed classes under their current names; None = forgotten. The history of renames is kept."""
    return [
        replace(event, class_names=present(event.class_names, names)) if event.kind == REFRESHED else event
        for event in events
    ]  # fmt: skip


def present(class_names: Iterable[str], names: Mapping[str, str | None]) -> tuple[str, ...]:
    """Map class names by `names`; names missing there stay, names mapped to None are left out."""
    now = (names.get(name, name) for name in class_names)
    return tuple(name for name in now if name is not None)


def names_now(events: Iterable[Event]) -> dict[str, str | None]:
    """Return, for renamed and forgotten classes, the name when learned → the current name, or None if forgotten.

    A name that was freed and learned again means the earlier of its classes.
    """
    now: dict[str, str | None] = {}
    for event in events:
        if event.kind == REFRESHED:
            continue
        olds, new = (event.class_names[:1], event.class_names[1]) if event.kind == RENAMED else (event.class_names, None)
        for old in olds:
            first = next((name for name, current in now.items() if current == old), None)
            if first is not None:
                now[first] = new
            elif now.get(old) is None:
                now[old] = new
    return now


def names_then(class_names: Iterable[str], events: Iterable[Event]) -> list[str]:
    """Return the names that classes had when they were learned."""
    then = {current: name for name, current in names_now(events).items() if current is not None}
    return [then.get(name, name) for name in class_names]


def known_of(class_names: Iterable[str], known: Collection[str], events: Iterable[Event]) -> dict[str, str]:
    """Return which classes of a run's own data set are known: name in the data set → current name.

    Args:
        class_names: the data set's.
        known: the current names of the known classes.
        events: what happened to them.
    """
    now = names_now(events)
    taken = set(now.values())
    found: dict[str, str] = {}
    for name in class_names:
        current = now.get(name)
        if current is None and name not in taken:
            # Never renamed; or forgotten and perhaps learned again.
            current = name
        if current is not None and current in known:
            found[name] = current
    return found
