"""What all sources of one data set share: how files are read, what could not be read, and what a person should know about it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator

import torch

from der_fast.config.schema import DataConfig
from der_fast.data.read.dali import dali_reader, is_installed
from der_fast.data.read.pillow_reader import PillowReader
from der_fast.data.read.resident import Resident
from der_fast.data.read.walk import Loaded, Reader, ReadSettings, Walk
from der_fast.errors import DataError

_MOST_WORKERS = 16
_MOST_LISTED = 20

_log = logging.getLogger(__name__)


def read_settings(config: DataConfig) -> ReadSettings:
    """Return how a configuration reads files; 'auto' is DALI if it is installed, else Pillow."""
    reader = config.reader if config.reader in ("dali", "pillow") else ("dali" if is_installed() else "pillow")
    workers = config.workers if config.workers is not None else min(os.cpu_count() or 1, _MOST_WORKERS)
    return ReadSettings(
        reader,
        workers,
        config.prefetch,
        config.timeout,
        config.hardware_load,
        config.width_hint,
        config.height_hint,
        config.cache_gib,
    )


class Library:
    """Reads files.

    Args:
        settings: how.
        say: called, once each, with what a person should know.

    Attributes:
        broken: path → reason of every file that could not be read so far.
        notes: what was said.
        digests: path → SHA-256 of files whose contents were read.
    """

    def __init__(self, settings: ReadSettings, say: Callable[[str], None] | None = None) -> None:
        self.settings = settings
        self.say_to = say
        self.broken: dict[str, str] = {}
        self.notes: list[str] = []
        self.digests: dict[str, str] = {}
        self._reader: Reader | None = None
        self._resident: dict[torch.device, Resident | None] = {}

    def say(self, line: str) -> None:
        """Add a line to the report's notes and report it, once."""
        if line not in self.notes:
            self.notes.append(line)
            _log.info("%s", line)
            if self.say_to is not None:
                self.say_to(line)

    def read(self, walk: Walk) -> Iterator[Loaded]:
        """Yield the batches of a walk from its start, from the resident cache if there is one and they fit; count what cannot be read.

        Raises:
            DataError: more than three and more than 1 % of the images cannot be read, or a batch did not come in time,
                or the reader lost some.
        """
        total, found = sum(map(len, walk.batches)), walk.start.faults
        resident = self._cache(walk.device)
        reader = resident if resident is not None and resident.holds(walk) else self.reader()
        due = sum(len(positions) for _, positions in walk.rest)
        for loaded in reader.read(walk):
            found += len(loaded.problems)
            due -= len(loaded.positions) + len(loaded.problems)
            self._note_problems(loaded, found, total)
            yield loaded
        if due:
            raise DataError(
                f"{due} of {total} images were neither read nor refused; this is a bug in the reader {reader.name!r}, please report it"
            )

    def _note_problems(self, loaded: Loaded, found: int, total: int) -> None:
        for path, reason in loaded.problems:
            if path not in self.broken:
                self.broken[path] = reason
                _log.warning("left out, cannot be read: %s: %s", path, reason)
        if found > max(3, total // 100):
            raise DataError(f"{found} of the first images read, of {total} in all, cannot be read; fix or remove them:\n{self.listed()}")

    def listed(self) -> str:
        """Return the unreadable files, one per line."""
        lines = [f"  {path}: {reason}" for path, reason in self.broken.items()]
        more = [f"  … and {len(lines) - _MOST_LISTED} more; the log names them all"] if len(lines) > _MOST_LISTED else []
        return "\n".join(lines[:_MOST_LISTED] + more)

    def reader(self) -> Reader:
        """Return what decodes files; it is made when first needed."""
        if self._reader is None:
            if self.settings.reader == "dali":
                self._reader = dali_reader(self.settings)
                self.say("images are decoded by nvidia-dali")
            else:
                self._reader = pillow = PillowReader(self.settings)
                where = f"{pillow.workers} process(es)" if pillow.workers else "this process"
                self.say(f"images are decoded by Pillow in {where}; with nvidia-dali (der_fast[dali]) it is faster")
        return self._reader

    def _cache(self, device: torch.device) -> Resident | None:
        """Return the resident cache for a device; None if there is no budget."""
        if device not in self._resident:
            budget = 0.0
            if self.settings.cache_gib is not None:
                budget = self.settings.cache_gib * 2**30
            elif device.type == "cuda":
                budget = torch.cuda.mem_get_info(device)[0] / 2
            self._resident[device] = Resident(self.settings, budget, device, self.say) if budget else None
        return self._resident[device]

    def close(self) -> None:
        """Let go of threads, pipelines and cached images; the next walk makes them again."""
        for part in (self._reader, *self._resident.values()):
            if part is not None:
                part.close()
        self._reader = None
        self._resident.clear()
