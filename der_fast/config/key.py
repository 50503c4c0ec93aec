"""How a configuration key is declared: once, with everything there is to know about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from der_fast.config.rules import Rule


class Change(Enum):
    """What may change a key once something was learned; the value is the documentation's word for it."""

    NEVER = "never"
    """Frozen extractors would see other images, or not fit."""
    LEARN = "learn"
    """Another lesson (`der-fast learn`), but not --resume: a run is finished as it was started."""
    RESUME = "resume"
    """--resume too: the key decides where and how a run computes, not what it learns."""
    PLACE = "place"
    """Like RESUME; it says where the images are now: checksums show whether they are still the same."""


@dataclass(frozen=True)
class Key:
    """One key of the configuration.

    Args:
        default: its value if nothing sets it.
        rule: the values that it takes.
        doc: its meaning, in one line.
        change: what may change it once something was learned.
        method: the only method that has this key; None if all have it.
    """

    default: Any
    rule: Rule
    doc: str
    change: Change
    method: str | None


def key(default: Any, rule: Rule, doc: str, change: Change = Change.LEARN, *, method: str | None = None) -> Any:
    """Declare a field of the configuration; see `Key`."""
    return field(default=default, metadata={"key": Key(default, rule, doc, change, method)})
