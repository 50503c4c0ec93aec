"""The protocol of a method of class-incremental learning: at most eight verbs, which the engine calls for every step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

import torch

from der_fast.config.schema import Config
from der_fast.data.source import ImageSource
from der_fast.model.readout import Readout
from der_fast.training.context import Context
from der_fast.training.model import Model
from der_fast.training.packing import Packed
from der_fast.training.state import StepState

# Images to learn from, and held-out ones or None.
Split = tuple[ImageSource, "ImageSource | None"]
State = TypeVar("State", bound=StepState)


class Method(Protocol[State]):
    """A method. The engine calls begin, split, train, pack, finish, readout and facts in this order; it knows nothing else about it.

    After an interruption the step begins again and its state is restored; then train, pack and finish are called as usual and do what
    remains. Each of them therefore looks at `state.stage` first, and a finished stage ends with `state.enter` and `context.save`.
    The batch loss and the constraint on weights after every update are not verbs: they are arguments of the stages
    (`der_fast.training.stage.Stage`) that the method runs.

    Attributes:
        joint: the method trains on the images of all classes seen so far, without a rehearsal memory.
        figures: what `facts` returns for every step: name in ``metrics.json`` → unit and meaning.
    """

    joint: bool
    figures: Mapping[str, tuple[str, str]]

    def begin(self, context: Context, model: Model, train: ImageSource) -> State:
        """Return the parts of the next step, on the device: what is trained, where it starts, how the classifier grows."""
        ...

    def split(self, context: Context, model: Model, train: ImageSource) -> Split:
        """Return the images of `train` to learn from and to choose exemplars from, and held-out ones, which only `finish` sees, or None."""
        ...

    def train(self, context: Context, model: Model, state: State, source: ImageSource) -> None:
        """Do everything before the network is final, in named stages, on new images and memory, labelled over all seen classes.

        Raises:
            DivergenceError: the loss is no longer finite.
            Stopped: a signal says stop.
        """
        ...

    def pack(self, context: Context, model: Model, state: State, source: ImageSource) -> Packed:
        """Return the finished network; called again if a step resumes in a later stage, and then returns the same."""
        ...

    def finish(self, context: Context, model: Model, state: State, source: ImageSource, held: ImageSource | None) -> None:
        """Train on the frozen network, in named stages: only its classifier may change; raises DivergenceError, Stopped.

        Args:
            context: settings and listeners.
            model: the finished model with its refilled memory; its readout is still that of the step before.
            state: the step in progress.
            source: what was trained on: new images and the memory before the step.
            held: what `split` held out.
        """
        ...

    def readout(self, context: Context, model: Model, state: State) -> Readout:
        """Return how the classifier is used at test time; `model` is the finished model with its memory."""
        ...

    def facts(self, context: Context, state: State, packed: Packed) -> dict[str, Any]:
        """Return the method's own figures for a step, as plain JSON values, under the names that `figures` declares."""
        ...

    def label(self, config: Config) -> str:
        """Return the method's name in reports under a configuration."""
        ...


def placed(context: Context, state: State) -> State:
    """Move a new step's parts to the device, and its extractor to the run's memory format."""
    for part in state.modules().values():
        part.to(context.device)
    if context.config.runtime.channels_last:
        state.extractor.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return state
