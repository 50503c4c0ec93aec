"""A step's mask logits over time: several times per epoch while they are learned, before and after the cut, and at the end."""

from __future__ import annotations

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
    """

    times: list[float] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    def add(self, time: float, logits: Tensor) -> None:
        """Record the logits (C,) at `time`."""
        self.times.append(time)
        self.logits.append(logits.detach().cpu().clone())

    def tensors(self) -> dict[str, Tensor]:
        """The log as two tensors: ``times`` (rows,) float64 and ``logits`` (rows, C) float32; empty if nothing was recorded."""
        if not self.times:
            return {}
        return {"times": torch.tensor(self.times, dtype=torch.float64), "logits": torch.stack(self.logits)}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> MaskLog:
        """The inverse of `tensors`."""
        return cls(tensors["times"].tolist(), list(tensors["logits"])) if tensors else cls()


def is_noted(batch: int, batches: int, learned_epochs: int) -> bool:
    """Whether to record the logits after batch `batch` (1-based) of an epoch: up to eight times, less often if many epochs learn masks."""
    marks = max(min(_MOST_ROWS // max(learned_epochs, 1), _MOST_PER_EPOCH), 1)
    return batch * marks // batches != (batch - 1) * marks // batches
