"""What a run adds to learning one step: checkpoints and the origin of the images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from der_fast.training.provenance import Origin
from der_fast.training.state import StepState


def _nothing(state: StepState) -> None:
    pass


@dataclass(frozen=True)
class Hooks:
    """What happens around a step.

    Args:
        origin: where the images come from, for later measurements; default: they were given, and the test images of the trained classes
            were held out.
        announce: notify the observer of new classes with fewer images than their memory quota; a run does so once for all steps.
        restore: brings a step that has just begun to its last checkpoint and returns True; returns False if there is none, even if it
            has changed the step by then.
        save: called with the step's state every `runtime.checkpoint_seconds` and at the end of every stage.
    """

    origin: Origin | None = None
    announce: bool = True
    restore: Callable[[StepState], bool] | None = None
    save: Callable[[StepState], None] = _nothing

    def begun(self, begin: Callable[[], StepState]) -> StepState:
        """Return a new step, or the step at its last checkpoint."""
        state = begin()
        if self.restore is not None and not self.restore(state):
            return begin()
        return state
