"""How far a pass over images went, so that another one can go on from there."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """A place between two batches of a pass.

    Args:
        batches: how many lie behind, those of which no image could be read included.
        faults: how many of their images could not be read.
    """

    batches: int = 0
    faults: int = 0


BEGINNING = Place()
