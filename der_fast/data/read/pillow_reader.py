"""Decoding with Pillow in separate processes, for machines without nvidia-dali."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout

import numpy as np
import torch

from der_fast.data.augment.draws import Ints
from der_fast.data.decode.crops import Cropped, Crops, decode_crops
from der_fast.data.decode.processes import DecodingProcesses, usable
from der_fast.data.read.walk import Loaded, ReadSettings, Walk
from der_fast.errors import DataError

_LEFT: list[DecodingProcesses | None] = []


class PillowReader:
    """Reads with Pillow; see `Reader`.

    Args:
        settings: `workers`, `prefetch` and `timeout` are used. If no process can be started (from a program frozen into one file),
            this one decodes.
    """

    name = "pillow"

    def __init__(self, settings: ReadSettings) -> None:
        self.settings = settings
        self.workers = settings.workers if usable() else 0
        self._processes: DecodingProcesses | None = None
        self._owner = os.getpid()

    def read(self, walk: Walk) -> Iterator[Loaded]:
        """Yield the batches of a walk in order; see `Reader.read`."""
        if not self.workers:
            for number, positions in walk.rest:
                yield _loaded(walk, number, positions, [decode_crops(_crops(walk, positions))])
            return
        ahead: deque[tuple[int, Ints, list[Future[Cropped]]]] = deque()
        try:
            for number, positions in walk.rest:
                ahead.append((number, positions, self._begun(walk, positions)))
                if len(ahead) > self.settings.prefetch:
                    yield self._done(walk, *ahead.popleft())
            while ahead:
                yield self._done(walk, *ahead.popleft())
        except DataError:
            # A process that died or hangs is of no use to the next walk.
            self.close()
            raise
        finally:
            for _, _, parts in ahead:
                for part in parts:
                    part.cancel()

    def _begun(self, walk: Walk, positions: Ints) -> list[Future[Cropped]]:
        """Start decoding a batch, in all processes together."""
        if self._owner != os.getpid():
            # The decoding processes belong to the parent of this fork, so it must not talk to them too; nor free pipes that
            # a thread held, which is lost here.
            _LEFT.append(self._processes)
            self._processes, self._owner = None, os.getpid()
        if self._processes is None:
            self._processes = DecodingProcesses(self.workers)
        parts = np.array_split(positions, min(self.workers, max(len(positions), 1)))
        return [self._processes.submit(_crops(walk, part)) for part in parts]

    def _done(self, walk: Walk, number: int, positions: Ints, parts: list[Future[Cropped]]) -> Loaded:
        until = time.monotonic() + self.settings.timeout
        try:
            found = [part.result(max(until - time.monotonic(), 0.0)) for part in parts]
        except FutureTimeout:
            raise DataError(
                f"no batch of images came within data.timeout={self.settings.timeout:g} seconds; check the drive that holds "
                f"{walk.table.roots[0]}, or raise data.timeout"
            ) from None
        return _loaded(walk, number, positions, found)

    def close(self) -> None:
        """End the processes; the next walk starts new ones."""
        if self._owner == os.getpid() and self._processes is not None:
            self._processes.close()
            self._processes = None


def _crops(walk: Walk, positions: Ints) -> Crops:
    paths = [walk.path(position) for position in positions.tolist()]
    return Crops(paths, walk.numbers(positions), walk.resized, walk.transform.size)


def _loaded(walk: Walk, number: int, positions: Ints, parts: list[Cropped]) -> Loaded:
    """Join the parts of a batch."""
    starts = np.cumsum([0, *(len(part.kept) + len(part.problems) for part in parts)])
    kept = positions[np.concatenate([start + part.kept for start, part in zip(starts, parts, strict=False)])]
    pixels = parts[0].pixels if len(parts) == 1 else np.concatenate([part.pixels for part in parts])
    problems = [problem for part in parts for problem in part.problems]
    return Loaded(walk.finished(torch.from_numpy(pixels), walk.numbers(kept)), kept, number, problems)
