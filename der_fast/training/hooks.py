"""What a run adds to the learning of one step: checkpoints, and where the images come from."""

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
        origin: where the images come from, for later measurements; default: they were given, and the test images of the classes that are
            trained were held out.
        announce: tell the observer about new classes with fewer images than their memory quota; a run tells it once for all steps.
        restore: brings a step that has just begun to its last checkpoint and returns True; returns False where there is none, whatever it
            did to the step until then.
        save: called with the step's state every `runtime.checkpoint_seconds` and at the end of every stage.
    """

    origin: Origin | None = None
    announce: bool = True
    restore: Callable[[StepState], bool] | None = None
    save: Callable[[StepState], None] = _nothing

    def begun(self, begin: Callable[[], StepState]) -> StepState:
        """Return a step that begins, or goes on from its last checkpoint."""
        state = begin()
        if self.restore is not None and not self.restore(state):
            return begin()
        return state
