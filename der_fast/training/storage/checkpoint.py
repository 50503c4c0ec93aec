"""Checkpoints within a step: one every `runtime.checkpoint_seconds` and one at the end of every stage; the last few are kept."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from der_fast.errors import CheckpointError
from der_fast.files import remove_leftovers
from der_fast.training.state import StepState
from der_fast.training.storage.named_files import load_record, remove_record, save_record
from der_fast.training.storage.snapshot import Snapshot, snapshot

FOLDER = "checkpoints"


class Checkpoints:
    """The checkpoints of the current step.

    They are written by a thread, one after the other, while training goes on.

    Args:
        run: the run's folder.
        keep: number of checkpoints to keep.
        task: names what is being learned (see `task_of`); checkpoints of anything else are not restored.
    """

    def __init__(self, run: Path, keep: int, task: str = "") -> None:
        self.folder, self.keep, self.task = run / FOLDER, keep, task
        self._writer: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None

    def _stem(self, state: StepState) -> Path:
        order = state.stages + 1
        # Those within an epoch sort after its start and before its end.
        within = "" if state.position is None else f"-{state.position.place.batches:08d}"
        return self.folder / f"{state.step:03d}-{order}-{state.stage}-{state.epoch:04d}{within}"

    def stems(self) -> list[Path]:
        """The existing checkpoints, oldest first, once all are written; raises StorageError as `flush` does."""
        self.flush()
        return self._written()

    def _written(self) -> list[Path]:
        return sorted(path.with_suffix("") for path in self.folder.glob("*.json"))

    def save(self, state: StepState) -> None:
        """Copy the state, and let the thread write it and delete all but the last few; returns before that is done.

        Raises:
            StorageError: the previous checkpoint could not be written.
        """
        self.flush()
        if self._writer is None:
            self._writer = ThreadPoolExecutor(1, "checkpoints")
        facts = copy.deepcopy({**state.facts(), "task": self.task})
        self._pending = self._writer.submit(self._write, self._stem(state), snapshot(state.tensors()), facts)

    def flush(self) -> None:
        """Wait until everything saved is on disk; raises StorageError if it could not be written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, newest: Path, copies: Snapshot, facts: dict[str, Any]) -> None:
        save_record(newest, copies.tensors(), facts)
        stems = self._written()
        # A step that is learned again may find later checkpoints of its first attempt: they must not outlive the new ones.
        last = stems.index(newest) + 1
        for stem in [*stems[: max(last - self.keep, 0)], *stems[last:]]:
            remove_record(stem)

    def restore(self, state: StepState, warn: Callable[[str], None]) -> bool:
        """Bring a freshly begun step to its newest checkpoint that verifies; returns False if there is none.

        Args:
            state: as `begin_step` made it; changed in place, even if False is returned.
            warn: called for every checkpoint that had to be skipped.
        """
        for stem in reversed(self.stems()):
            if not stem.name.startswith(f"{state.step:03d}-"):
                continue
            try:
                tensors, facts = load_record(stem)
                if facts["task"] != self.task:
                    continue
                state.restore(tensors, facts)
            except (CheckpointError, KeyError, RuntimeError, TypeError, ValueError) as error:
                warn(f"checkpoint {stem.name} is skipped, going back to the one before: {error}")
                continue
            return True
        return False

    def clear(self) -> None:
        """Delete every checkpoint: the step they belong to is finished and saved."""
        self.flush()
        for stem in self.stems():
            remove_record(stem)
        # A process killed between a checkpoint's two files leaves tensors without a manifest.
        for path in self.folder.glob("*.safetensors"):
            path.unlink(missing_ok=True)
        remove_leftovers(self.folder)


def task_of(facts: Any) -> str:
    """Return a short name for everything that decides what a step learns, given as plain JSON values."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
