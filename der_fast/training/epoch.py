"""Metering an epoch: loss, accuracy and speed, without reading a number from the device in every batch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor

from der_fast.data.read.place import BEGINNING, Place
from der_fast.training.position import Position

Item = TypeVar("Item")


def tally(totals: Tensor, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
    """Add a batch to (2,) `totals`: its mean loss times its images, and hits of `logits` (N, classes) against `labels` (N,)."""
    totals[0].add_(loss.detach(), alpha=len(labels))
    totals[1].add_((logits.detach().argmax(1) == labels).sum())


class EpochMeter:
    """Sums loss, hits, images and seconds over an epoch; loss and hits on the device.

    Args:
        device: where the sums lie.
        position: where an interrupted epoch continues, or None.
        totals: (2,) float64 on the device, set here to their values at the start; the caller adds to them with `tally`.

    Attributes:
        start: where the pass over the images starts.
        batch: number of batches trained.
        images: number of images trained.
        waited: seconds spent waiting for images.
    """

    def __init__(self, device: torch.device, position: Position | None = None, totals: Tensor | None = None) -> None:
        self.totals = torch.zeros(2, dtype=torch.float64, device=device) if totals is None else totals.zero_()
        self.images = self.batch = 0
        self.waited = 0.0
        self.start = BEGINNING
        self.started = time.perf_counter()
        # A resumed epoch does not know what was computed before the interruption.
        self._computing = time.process_time() if device.type == "cpu" and position is None else None
        if position is not None:
            self.start, self.batch, self.images = position.place, position.batches, position.images
            self.totals.copy_(position.totals)
            self.started -= position.seconds
            self.waited = position.waited

    def timed(self, batches: Iterator[Item]) -> Iterator[Item]:
        """Pass batches on and measure the wait for each, without waiting for the GPU's pending work."""
        while True:
            asked = time.perf_counter()
            try:
                batch = next(batches, None)
            finally:
                self.waited += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def advance(self, images: int) -> None:
        """Count one batch of `images` images, whose loss and hits are already in the totals."""
        self.images += images
        self.batch += 1

    def means(self) -> tuple[float, float]:
        """Return mean loss and accuracy (percent); reads from the device."""
        loss, hits = (self.totals / max(self.images, 1)).tolist()
        return loss, 100 * hits

    @property
    def seconds(self) -> float:
        """Wall time so far."""
        return time.perf_counter() - self.started

    @property
    def processor_seconds(self) -> float | None:
        """Processor time so far, on a CPU; None if unknown."""
        return None if self._computing is None else time.process_time() - self._computing

    @property
    def images_per_s(self) -> float:
        """Speed so far."""
        return self.images / max(self.seconds, 1e-9)

    def position(self, place: Place) -> Position:
        """Return how far the epoch got; reads from the device."""
        return Position(place, self.batch, self.images, self.totals.cpu().clone(), self.seconds, self.waited)


def count_batches(images: int, batch_size: int) -> int:
    """Number of batches of a shuffled epoch: a last batch of one image is dropped if there are others."""
    full, rest = divmod(images, batch_size)
    return full + (rest > 1 or (rest == 1 and full == 0))
