"""Checkpoints within a step: one every `runtime.checkpoint_seconds` and at the end of every stage, the last few kept."""

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
    """The checkpoints of the step in progress.

    They are written by a thread, one after the other, while training goes on.

    Args:
        run: the run's folder.
        keep: how many stay.
        task: names what is being learned (see `task_of`); checkpoints of anything else are not restored.
    """

    def __init__(self, run: Path, keep: int, task: str = "") -> None:
        self.folder, self.keep, self.task = run / FOLDER, keep, task
        self._writer: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None

    def _stem(self, state: StepState) -> Path:
        order = state.stages + 1
        # In the middle of an epoch they sort behind its beginning and before its end.
        within = "" if state.position is None else f"-{state.position.place.batches:08d}"
        return self.folder / f"{state.step:03d}-{order}-{state.stage}-{state.epoch:04d}{within}"

    def stems(self) -> list[Path]:
        """What is there, oldest first, once everything saved is written; raises StorageError as `flush` does."""
        self.flush()
        return self._written()

    def _written(self) -> list[Path]:
        return sorted(path.with_suffix("") for path in self.folder.glob("*.json"))

    def save(self, state: StepState) -> None:
        """Copy the state, have it written, and have all but the last few checkpoints deleted; returns before that is done.

        Raises:
            StorageError: the checkpoint before could not be written.
        """
        self.flush()
        if self._writer is None:
            self._writer = ThreadPoolExecutor(1, "checkpoints")
        facts = copy.deepcopy({**state.facts(), "task": self.task})
        self._pending = self._writer.submit(self._write, self._stem(state), snapshot(state.tensors()), facts)

    def flush(self) -> None:
        """Wait until what was saved is on disk; raises StorageError where it could not be written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, newest: Path, copies: Snapshot, facts: dict[str, Any]) -> None:
        save_record(newest, copies.tensors(), facts)
        stems = self._written()
        # A step that is learned again may find checkpoints further on, of its first time: they must not outlive the new ones.
        last = stems.index(newest) + 1
        for stem in [*stems[: max(last - self.keep, 0)], *stems[last:]]:
            remove_record(stem)

    def restore(self, state: StepState, warn: Callable[[str], None]) -> bool:
        """Bring a freshly begun step to its newest checkpoint that verifies; returns False where there is none.

        Args:
            state: as `begin_step` made it; changed in place, also where False is returned.
            warn: told about every checkpoint that had to be passed over.
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
                warn(f"checkpoint {stem.name} is passed over, going back to the one before: {error}")
                continue
            return True
        return False

    def clear(self) -> None:
        """Delete every checkpoint: the step they belong to is finished and saved."""
        self.flush()
        for stem in self.stems():
            remove_record(stem)
        # A process that was killed between a checkpoint's two files leaves tensors without a manifest.
        for path in self.folder.glob("*.safetensors"):
            path.unlink(missing_ok=True)
        remove_leftovers(self.folder)


def task_of(facts: Any) -> str:
    """Return a short name for everything that decides what a step learns, given as plain JSON values."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
