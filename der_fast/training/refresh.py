"""More images of known classes: the rehearsal memory is chosen again and the classifier retrained; extractors do not change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from der_fast.config.schema import Config
from der_fast.data.duplicates import held_already
from der_fast.data.source import ImageSource
from der_fast.errors import ConfigError, DataError, Spelling
from der_fast.model.classifier import new_classifier
from der_fast.model.readout import linear_readout
from der_fast.seeds import generator
from der_fast.training.classifier_stage import train_classifier
from der_fast.training.context import Context
from der_fast.training.model import Model
from der_fast.training.rehearsal import refill, rehearsal
from der_fast.training.sources import counts_by_class, without_empty_classes
from der_fast.training.state import CLASSIFIER, StepState


def begin_refresh(context: Context, model: Model) -> StepState:
    """Build the state of a refresh: its only part is the classifier; it has the last step's number and is in the classifier stage."""
    assert model.network.head is not None
    step = len(model.class_sets)
    head = new_classifier(model.network.head.in_features, model.network.head.out_features, generator(context.seed, "classifier", step))
    return StepState(step, {"head": head.to(context.device)}, stage=CLASSIFIER, stages=1)


def refresh(context: Context, model: Model, state: StepState, train: ImageSource) -> Model:
    """Complete a refresh from the point that `state` has reached; return the new model.

    Args:
        context: settings and listeners.
        model: the model so far; left unchanged.
        state: the refresh in progress; changed in place.
        train: new images of known classes.

    Raises:
        DivergenceError: the loss is no longer finite.
    """
    source = rehearsal(model, train)
    state.unreadable = source.recall(state.unreadable)
    context.observer.step_begins(state.step, state.step, train.class_names, len(source))
    train_classifier(context, state, model.network.bank, source)
    memory = refill(context, model, model.memory, train)
    network = replace(model.network, head=state.head)
    return replace(model, network=network, readout=linear_readout(state.head, context.config.classifier.temperature), memory=memory)


def check_refresh(config: Config, model: Model, train: ImageSource) -> None:
    """Refuse a refresh that would make the classifier worse, before any work is done.

    Raises:
        ConfigError: there is no classifier stage.
        DataError: known classes without images, neither given nor in the rehearsal memory.
    """
    if not config.classifier.epochs:
        raise ConfigError(
            "images of known classes retrain the classifier in the classifier stage, which classifier.epochs = 0 switches off; give ",
            Spelling("--set classifier.epochs=30", "classifier.epochs=30"),
        )
    given = {**(counts_by_class(model.memory) if model.memory is not None else {}), **counts_by_class(train)}
    missing = [name for name in model.class_names if not given.get(name)]
    if missing:
        raise DataError(
            f"the classifier cannot be retrained without images of {', '.join(map(repr, missing[:5]))}, and the rehearsal memory has none; "
            "give images of these classes too"
        )


def only_new_images(train: ImageSource, memory: ImageSource | None, known: Sequence[str]) -> tuple[ImageSource, int]:
    """Leave out images of known classes that the rehearsal memory already holds; return the rest, and how many were left out.

    Raises:
        DataError: nothing would be left, or a file could not be read in time.
    """
    again = [label for label, name in enumerate(train.class_names) if name in known]
    if memory is None or not again:
        return train, 0
    held = held_already(train, memory)
    for label in range(len(train.class_names)):
        if label not in again:
            held[train.labels == label] = False
    count = int(held.sum())
    if not count:
        return train, 0
    if count == len(train):
        raise DataError(f"all {count} images are already in the rehearsal memory; give other images of these classes")
    return without_empty_classes(train.subset((~held).nonzero().flatten())), count
