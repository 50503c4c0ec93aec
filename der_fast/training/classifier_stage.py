"""The classifier stage: the classifier is retrained on the class-balanced subset, over frozen features (eq. 14)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from der_fast.compaction.bank import FrozenBank
from der_fast.data.source import ImageSource
from der_fast.model.classifier import initialise_classifier
from der_fast.model.readout import Readout, linear_readout
from der_fast.seeds import generator
from der_fast.training.batch_step import on_device
from der_fast.training.context import Context
from der_fast.training.feed import FeatureFeed, Feed
from der_fast.training.kept import KeptFeatures, saves
from der_fast.training.memory import balanced_subset
from der_fast.training.stage import Stage
from der_fast.training.state import CLASSIFIER, StepState


def has_classifier_stage(context: Context, step: int) -> bool:
    """Whether step `step` (1-based) has a classifier stage."""
    return step > 1 and context.config.classifier.epochs > 0


def classifier_stage(context: Context, state: StepState, bank: FrozenBank, source: ImageSource) -> Stage:
    """Return the stage that retrains `state.head` from scratch, or from where `state` stands.

    Args:
        context: settings and listeners.
        state: the step in progress, in its classifier stage.
        bank: all extractors, the new one included; they receive no gradients.
        source: new classes and memory, labelled over all seen classes.
    """
    schedule, head = context.config.classifier, state.head
    names = (context.seed, CLASSIFIER, state.step)
    if state.epoch == 0 and state.position is None:
        initialise_classifier(head, generator(*names, "start"))
    chosen = balanced_subset(source.labels, generator(*names, "subset"))

    feed: Feed | None = None
    if saves(schedule.views, schedule.epochs):
        kept = KeptFeatures(context, bank, source, names[1:], schedule.views, schedule.epochs, chosen)
        feed = FeatureFeed(context, kept, source.labels[chosen], schedule.batch_size)

    def loss(inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(inputs if feed is not None else context.features(bank, inputs))
        return F.cross_entropy(logits / schedule.temperature, labels), logits

    graphed = on_device(context)
    return Stage(context, state, source, schedule, loss, parts={"head": head}, chosen=chosen, feed=feed, name=CLASSIFIER, graphed=graphed)


def train_classifier(context: Context, state: StepState, bank: FrozenBank, source: ImageSource) -> None:
    """Retrain `state.head`; arguments as in `classifier_stage`. Raises Stopped where a signal says stop."""
    classifier_stage(context, state, bank, source).run()


def classifier_readout(context: Context, state: StepState) -> Readout:
    """Return the readout of a linear classifier after its step; with the classifier stage's temperature if there was such a stage."""
    trained = has_classifier_stage(context, state.step)
    return linear_readout(state.head, context.config.classifier.temperature if trained else 1.0)
