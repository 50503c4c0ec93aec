"""The classifier stage: the classifier is retrained on the class-balanced subset, over frozen features (eq. 14)."""

from __future__ import annotations

import torch.nn.functional as F

from der_fast.compaction.bank import FrozenBank
from der_fast.data.source import ImageSource
from der_fast.model.classifier import initialise_classifier
from der_fast.seeds import generator
from der_fast.stopping import deferred, stop_if_requested
from der_fast.training.context import Context
from der_fast.training.epoch import EpochMeter, count_batches
from der_fast.training.memory import balanced_subset
from der_fast.training.optimizer import NamedSGD
from der_fast.training.schedule import learning_rate
from der_fast.training.state import StepState


def train_classifier(context: Context, state: StepState, bank: FrozenBank, source: ImageSource) -> None:
    """Retrain `state.head` from scratch, or from where the state stands; raises Stopped where a signal says stop.

    Args:
        context: settings and listeners.
        state: the step in progress, in its classifier stage.
        bank: all extractors, the new one included; nothing is back-propagated into them.
        source: new classes and memory, labelled over all seen classes.
    """
    schedule = context.config.classifier
    names = (context.seed, "classifier", state.step)
    if state.epoch == 0 and state.position is None:
        initialise_classifier(state.head, generator(*names, "start"))
    chosen = balanced_subset(source.labels, generator(*names, "subset"))
    optimizer = NamedSGD({"head": state.head}, schedule)
    optimizer.restore(state.momentum)
    count = count_batches(len(chosen), schedule.batch_size)

    def write_down() -> None:
        state.momentum = optimizer.momentum()

    with deferred():
        while state.epoch < schedule.epochs:
            lr = learning_rate(schedule, state.epoch)
            optimizer.set_lr(lr)
            meter = EpochMeter(context, state, schedule.epochs, count)
            batches = source.batches(
                chosen,
                schedule.batch_size,
                transform=context.train_transform,
                generator=generator(*names, state.epoch),
                shuffle=True,
                device=context.device,
                channels_last=context.config.runtime.channels_last,
                start=meter.start,
            )
            for batch in meter.timed(batches):
                logits = state.head(context.features(bank, batch.images))
                loss = F.cross_entropy(logits / schedule.temperature, batch.labels)
                optimizer.step(loss)
                meter.add(loss, logits, batch.labels)
                meter.checkpoint(batch.place, lr, write_down)
            write_down()
            meter.finish(lr)
            context.save(state)
            stop_if_requested()
