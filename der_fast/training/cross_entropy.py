"""The simplest stage: an extractor and its classifier are trained with cross-entropy on all images alike."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from der_fast.config.schema import ScheduleConfig
from der_fast.data.source import ImageSource
from der_fast.training.batch_step import TrainedFeatures, on_device
from der_fast.training.context import Context
from der_fast.training.stage import Stage
from der_fast.training.state import StepState


class CrossEntropyStage(Stage):
    """Trains the parts 'extractor' and 'head' of a step; see `Stage`.

    Args:
        context, state, source, schedule, name: as in `Stage`.
    """

    def __init__(
        self, context: Context, state: StepState, source: ImageSource, schedule: ScheduleConfig, *, name: str | None = None
    ) -> None:
        features = TrainedFeatures(context, state.extractor)

        def loss(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            logits = state.head(features(images))
            return F.cross_entropy(logits, labels), logits

        super().__init__(context, state, source, schedule, loss, name=name, graphed=on_device(context))

    def begin_epoch(self) -> None:
        """At the end of the warm-up the classifier is initialised again, as in the authors' code."""
        if self.schedule.warmup_epochs and self.state.epoch == self.schedule.warmup_epochs:
            self.redraw("head")
