"""How a configuration key is declared: once, with everything that is known about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from der_fast.config.rules import Rule


class Change(Enum):
    """What may give a key another value once something was learned; the value is how the documentation puts it."""

    NEVER = "never"
    """Frozen extractors would see other images, or not fit."""
    LEARN = "learn"
    """Another lesson (`der-fast learn`), but not --resume: a run is learned as it was begun."""
    RESUME = "resume"
    """--resume too: the key decides where and how a run computes, not what it learns."""
    PLACE = "place"
    """As RESUME; says where the images lie, which is written down: checksums tell whether they are still the same."""


@dataclass(frozen=True)
class Key:
    """One key of the configuration.

    Args:
        default: its value where nothing sets it.
        rule: the values that it takes.
        doc: its meaning, in one line.
        change: what may change it once something was learned.
        method: the one that alone knows it, if it is one's.
    """

    default: Any
    rule: Rule
    doc: str
    change: Change
    method: str | None


def key(default: Any, rule: Rule, doc: str, change: Change = Change.LEARN, *, method: str | None = None) -> Any:
    """Declare a field of the configuration; see `Key`."""
    return field(default=default, metadata={"key": Key(default, rule, doc, change, method)})
