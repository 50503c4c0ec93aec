from __future__ import annotations

import inspect
from typing import Any

from der_fast.config.schema import Config
from der_fast.training.progress import EpochRecord, Observer, Observers

RECORD = EpochRecord(1, "representation", 2, 3, 0.5, 90.0, 0.1, None, None, 100.0)
EVENTS: dict[str, tuple[Any, ...]] = {
    "run_begins": (3, Config()),
    "step_begins": (1, 3, ("a", "b"), 10),
    "batch_ends": (1, "representation", 2, 3, 4, 5, 6),
    "epoch_so_far": (0.5, 90.0, 100.0),
    "epoch_ends": (RECORD,),
    "images_pass": ("evaluation", 5, 10),
    "step_ends": ({"step": 1},),
    "message": ("text",),
}


class Noting(Observer):
    """Notes every event with what came with it."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, tuple[Any, ...]]] = []

    def __getattribute__(self, name: str) -> Any:
        if name in EVENTS:
            return lambda *event: self.seen.append((name, event))
        return super().__getattribute__(name)


def test_every_event_reaches_every_observer() -> None:
    known = {name for name, _ in inspect.getmembers(Observer, inspect.isfunction) if not name.startswith("_")}
    assert known == set(EVENTS)
    one, other = Noting(), Noting()
    both = Observers([one, other])
    for name, event in EVENTS.items():
        getattr(both, name)(*event)
        getattr(Observer(), name)(*event)
    assert one.seen == other.seen == list(EVENTS.items())
