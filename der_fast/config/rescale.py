"""Shorter and longer versions of a schedule that keep its shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from der_fast.config.schema import Config, ScheduleConfig
from der_fast.config.tree import replace_keys

STAGES = ("first", "later", "classifier")


def stretched(base: Config, changes: Mapping[str, Any], begun: Config | None = None) -> dict[str, Any]:
    """Return `changes` plus milestones and warm-up of every stage whose `epochs` they change without giving these.

    Args:
        base: the configuration to change; its schedules are stretched.
        changes: dotted keys and values, as for `replace_keys`; what they give is kept.
        begun: the configuration of the run to resume. Earlier versions left milestones where they were, and a run started that way
            continues that way.

    Raises:
        ConfigError: epochs of the wrong type.
    """
    result = dict(changes)
    for stage in STAGES:
        key = f"{stage}.epochs"
        if key not in changes:
            continue
        schedule = getattr(base, stage)
        epochs = getattr(replace_keys(base, {key: changes[key]}), stage).epochs
        # A stage without epochs has no shape; epochs out of range are refused by the check of the whole configuration.
        if epochs == schedule.epochs or min(epochs, schedule.epochs) < 1:
            continue
        if begun is not None and _left_where_they_were(getattr(begun, stage), schedule, epochs):
            continue
        for name, value in rescaled_keys(schedule, epochs).items():
            result.setdefault(f"{stage}.{name}", value)
    return result


def _left_where_they_were(begun: ScheduleConfig, base: ScheduleConfig, epochs: int) -> bool:
    return begun.epochs == epochs and (begun.milestones, begun.warmup_epochs) == (base.milestones, base.warmup_epochs)


def unreached_note(config: Config, stages: tuple[str, ...] = STAGES) -> str | None:
    """Return what a person should know about milestones that training never reaches; None if there are none."""
    found = []
    for stage in stages:
        schedule = getattr(config, stage)
        beyond = [str(milestone) for milestone in schedule.milestones if milestone >= schedule.epochs]
        if beyond and schedule.epochs:
            falls = "falls less often than written" if len(beyond) < len(schedule.milestones) else "never falls"
            found.append(f"{stage}.milestones {', '.join(beyond)} of {schedule.epochs} epochs: the learning rate {falls}")
    return f"milestones that are never reached: {'; '.join(found)}" if found else None


def rescaled_keys(schedule: ScheduleConfig, epochs: int) -> dict[str, Any]:
    """Return the keys `epochs`, `milestones` and `warmup_epochs` of `schedule` stretched to `epochs` epochs.

    Milestones and warm-up move in proportion. Milestones stay distinct, increasing and inside the schedule; if it is too
    short for all of them, the earliest are dropped, since the last ones matter most for the result.

    Args:
        schedule: with at least one epoch.
        epochs: at least 1.
    """
    if epochs == schedule.epochs:
        return {"epochs": epochs, "milestones": schedule.milestones, "warmup_epochs": schedule.warmup_epochs}
    factor = epochs / schedule.epochs
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
