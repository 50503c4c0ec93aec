"""A position within an epoch, as it is saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from der_fast.data.read.place import Place


@dataclass(frozen=True)
class Position:
    """How far an epoch got.

    Attributes:
        place: position of its pass over the images.
        batches: batches trained so far.
        images: their images.
        totals: (2,) float64 on the CPU: their sums of loss and hits, as `epoch.tally` computes them.
        seconds: time spent on them.
        waited: of these seconds, time spent waiting for images.
    """

    place: Place
    batches: int
    images: int
    totals: Tensor
    seconds: float
    waited: float = 0.0

    def facts(self) -> dict[str, Any]:
        """Everything but the totals, as plain JSON values."""
        return {
            "place": [self.place.batches, self.place.faults],
            "batches": self.batches,
            "images": self.images,
            "seconds": self.seconds,
            "waited": self.waited,
        }

    @classmethod
    def of(cls, facts: Mapping[str, Any], totals: Tensor) -> Position:
        """The inverse of `facts`; raises KeyError or TypeError if they do not fit."""
        return cls(Place(*facts["place"]), facts["batches"], facts["images"], totals, facts["seconds"], facts.get("waited", 0.0))
