"""What is left of a weight gradient whose parts are not added yet."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Parts:
    """A weight gradient before its parts are added.

    Attributes:
        parts: (P, elements) float32.
        out: where their sum goes: `elements` in the order of their memory, float32; not written before.
    """

    parts: Tensor
    out: Tensor
