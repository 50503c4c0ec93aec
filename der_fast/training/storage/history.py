"""``history.json``: one row per finished epoch, written during the run, so that a job can be watched."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path

from der_fast.errors import StorageError
from der_fast.files import write_bytes
from der_fast.training.progress import EpochRecord, Observer

FILE = "history.json"
# Epochs may take a tenth of this; whoever watches looks no more often.
_SECONDS = 1.0
_COLUMNS = tuple(field.name for field in fields(EpochRecord))


def write_history(run: Path, records: Iterable[EpochRecord]) -> None:
    """Write RUN/history.json, ``{"epochs": [...]}`` with one line of text per epoch; raises StorageError."""
    _write(run, [_row(record) for record in records])


def _row(record: EpochRecord) -> str:
    return json.dumps({name: getattr(record, name) for name in _COLUMNS}, allow_nan=False)


def _write(run: Path, rows: Sequence[str]) -> None:
    text = ",\n".join(f" {row}" for row in rows)
    write_bytes(run / FILE, f'{{"epochs": [\n{text}\n]}}\n'.encode())


class HistoryFile(Observer):
    """Keeps RUN/history.json up to date, up to the last finished epoch of the current step.

    It is written at most once a second, and after the last epoch of a stage. Rows are turned into text once, so the thousandth epoch costs
    hardly more than the first. A write that fails (on Windows: while another program reads the file) is reported and tried again after the
    next epoch; a run resumes from its checkpoints.

    Args:
        run: the run's folder.
        finished: the epochs of all finished steps.
        say: called for the first write that fails.
    """

    def __init__(self, run: Path, finished: Iterable[EpochRecord], say: Callable[[str], None]) -> None:
        self.run, self.say = run, say
        self._finished = [_row(record) for record in finished]
        self._rows = list(self._finished)
        self._failed = False
        self._stored = -math.inf

    def go_on_from(self, records: Iterable[EpochRecord]) -> None:
        """Continue a step with these finished epochs: later epochs of the step in the file will be trained again."""
        self._rows = [*self._finished, *(_row(record) for record in records)]
        self._store()

    def epoch_ends(self, record: EpochRecord) -> None:
        """Add a row."""
        self._rows.append(_row(record))
        if time.perf_counter() - self._stored >= _SECONDS or record.epoch == record.epochs:
            self._store()

    def flush(self) -> None:
        """Write what was not written yet."""
        self._store()

    def _store(self) -> None:
        self._stored = time.perf_counter()
        try:
            _write(self.run, self._rows)
        except StorageError as error:
            if not self._failed:
                self.say(f"the file for watching the run is out of date until it can be written: {error}")
            self._failed = True
