"""Shorter and longer versions of a schedule that keep its shape."""

from __future__ import annotations

from typing import Any

from der_fast.config.schema import ScheduleConfig
from der_fast.errors import ConfigError


def rescaled_keys(schedule: ScheduleConfig, epochs: int) -> dict[str, Any]:
    """Return the keys `epochs`, `milestones` and `warmup_epochs` of `schedule` stretched to `epochs` epochs.

    Milestones and warm-up move in proportion. Milestones stay distinct, increasing and inside the schedule; where it is too
    short for all of them, the earliest go, since the last ones matter most for where training ends.

    Raises:
        ConfigError: `epochs` below 1.
    """
    if epochs < 1:
        raise ConfigError(f"--epochs takes whole numbers of at least 1, not {epochs}")
    if epochs == schedule.epochs:
        return {"epochs": epochs, "milestones": schedule.milestones, "warmup_epochs": schedule.warmup_epochs}
    factor = epochs / max(schedule.epochs, 1)
    warmup = min(max(1, round(schedule.warmup_epochs * factor)), epochs - 1) if schedule.warmup_epochs else 0
    return {"epochs": epochs, "milestones": _distinct(_scaled(schedule, factor), epochs), "warmup_epochs": warmup}


def _scaled(schedule: ScheduleConfig, factor: float) -> list[int]:
    """Scale the milestones that the schedule reaches; those beyond its end are never reached in the new one either."""
    return [round(milestone * factor) for milestone in schedule.milestones if milestone < schedule.epochs]


def _distinct(milestones: list[int], epochs: int) -> tuple[int, ...]:
    """Push equal milestones apart, from the last to the first, within [1, epochs − 1]."""
    kept: list[int] = []
    limit = epochs - 1
    for milestone in reversed(milestones):
        place = min(max(milestone, 1), limit)
        if place < 1:
            break
        kept.append(place)
        limit = place - 1
    return tuple(reversed(kept))


def parse_epochs(text: str) -> tuple[int, int]:
    """Read ``--epochs``: one number for every step, or ``first,later``; raises ConfigError on anything else."""
    parts = [part.strip() for part in text.split(",")]
    try:
        numbers = [int(part) for part in parts]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or min(numbers) < 1:
        raise ConfigError(f"--epochs takes one whole number, or two as first,later (e.g. 12,10), not {text!r}")
    return numbers[0], numbers[-1]
