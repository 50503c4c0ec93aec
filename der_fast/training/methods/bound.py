"""The upper bound: in every step one extractor is trained from scratch on all data of all seen classes."""

from __future__ import annotations

from dataclasses import replace

from der_fast.config.schema import Config
from der_fast.data.source import ImageSource
from der_fast.model.readout import Readout, linear_readout
from der_fast.training.context import Context
from der_fast.training.methods.replay import Replay
from der_fast.training.model import Model, Network
from der_fast.training.state import StepState


class Bound(Replay):
    """See `der_fast.training.method.Method`; it replays everything and takes nothing from the step before."""

    joint = True

    def begin(self, context: Context, model: Model, train: ImageSource) -> StepState:
        """Extractor and classifier start from scratch."""
        return super().begin(context, replace(model, network=Network(model.network.architecture)), train)

    def finish(self, context: Context, model: Model, state: StepState, source: ImageSource, held: ImageSource | None) -> None:
        """Nothing: the data is already balanced."""

    def readout(self, context: Context, model: Model, state: StepState) -> Readout:
        """The linear classifier."""
        return linear_readout(state.head)

    def label(self, config: Config) -> str:
        """'bound'."""
        return "bound"
