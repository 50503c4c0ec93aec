"""How far a pass over images has come, so that another one can continue from there."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """A place between two batches of a pass.

    Args:
        batches: how many are done, including those without any readable image.
        faults: how many of their images could not be read.
    """

    batches: int = 0
    faults: int = 0


BEGINNING = Place()
