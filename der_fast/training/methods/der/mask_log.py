"""A step's mask logits over time: several times per epoch while they are learned, before and after the cut, and at the end."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

# File name of the log in a finished step's folder.
FILE = "mask_logits.safetensors"
_MOST_ROWS, _MOST_PER_EPOCH = 64, 8


@dataclass
class MaskLog:
    """Rows of mask logits.

    Attributes:
        times: in epochs, in ascending order. Two rows with the same time are from before and after a cut.
        logits: one (C,) float32 tensor on the CPU per row.
        thresholds: (G,) float64: what the logits of every group had to exceed in the cut; None before it.
    """

    times: list[float] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    thresholds: Tensor | None = None

    def add(self, time: float, logits: Tensor, thresholds: Tensor | None = None) -> None:
        """Record the logits (C,) at `time`, and the thresholds (G,) of the first cut: later ones find the budget met."""
        # A log from before there were thresholds may have a cut without them.
        if self.thresholds is None and all(one != other for one, other in itertools.pairwise(self.times)):
            self.thresholds = thresholds
        self.times.append(time)
        self.logits.append(logits.detach().cpu().clone())

    def tensors(self) -> dict[str, Tensor]:
        """The log as tensors: ``times`` (rows,) float64, ``logits`` (rows, C) float32 and, once there was a cut, ``thresholds`` (G,)
        float64; empty if nothing was recorded.
        """
        if not self.times:
            return {}
        rows = {"times": torch.tensor(self.times, dtype=torch.float64), "logits": torch.stack(self.logits)}
        return rows if self.thresholds is None else {**rows, "thresholds": self.thresholds}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> MaskLog:
        """The inverse of `tensors`."""
        return cls(tensors["times"].tolist(), list(tensors["logits"]), tensors.get("thresholds")) if tensors else cls()


def is_noted(batch: int, batches: int, learned_epochs: int) -> bool:
    """Whether to record the logits after batch `batch` (1-based) of an epoch: up to eight times, less often if many epochs learn masks."""
    marks = max(min(_MOST_ROWS // max(learned_epochs, 1), _MOST_PER_EPOCH), 1)
    return batch * marks // batches != (batch - 1) * marks // batches
