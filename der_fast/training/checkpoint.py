"""Checkpoints within a step: one after every epoch and stage, the last few kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from der_fast.errors import CheckpointError
from der_fast.training.state import CLASSIFIER, StepState
from der_fast.training.store import load_record, remove_record, save_record

FOLDER = "checkpoints"


class Checkpoints:
    """The checkpoints of a run.

    Args:
        run: the run's folder.
        keep: how many stay.
    """

    def __init__(self, run: Path, keep: int) -> None:
        self.folder, self.keep = run / FOLDER, keep

    def _stem(self, state: StepState) -> Path:
        order = 2 if state.stage == CLASSIFIER else 1
        return self.folder / f"{state.step:03d}-{order}-{state.stage}-{state.epoch:04d}"

    def stems(self) -> list[Path]:
        """What is there, oldest first."""
        return sorted(path.with_suffix("") for path in self.folder.glob("*.json"))

    def save(self, state: StepState) -> None:
        """Write the state down and delete all but the last few; raises StorageError."""
        save_record(self._stem(state), state.tensors(), state.facts())
        for stem in self.stems()[: -self.keep]:
            remove_record(stem)

    def restore(self, state: StepState, warn: Callable[[str], None]) -> bool:
        """Bring a freshly begun step to its newest checkpoint that verifies; returns False where there is none.

        Args:
            state: as `begin_step` made it; changed in place.
            warn: told about every checkpoint that had to be passed over.
        """
        for stem in reversed(self.stems()):
            if not stem.name.startswith(f"{state.step:03d}-"):
                continue
            try:
                tensors, facts = load_record(stem)
                state.restore(tensors, facts)
            except (CheckpointError, KeyError, RuntimeError) as error:
                warn(f"checkpoint {stem.name} is passed over, going back to the one before: {error}")
                continue
            return True
        return False

    def clear(self) -> None:
        """Delete every checkpoint: the step they belong to is finished and saved."""
        for stem in self.stems():
            remove_record(stem)
