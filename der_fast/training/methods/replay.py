"""Replay: cross-entropy on new images and memory, with one extractor that every step trains further ('without expansion')."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from der_fast.compaction.bank import FrozenBank
from der_fast.config.schema import Config
from der_fast.data.source import ImageSource
from der_fast.model.classifier import grow_classifier
from der_fast.model.extractor import Extractor
from der_fast.model.readout import Readout
from der_fast.seeds import generator
from der_fast.training.classifier_stage import classifier_readout, has_classifier_stage, train_classifier
from der_fast.training.context import Context
from der_fast.training.cross_entropy import CrossEntropyStage
from der_fast.training.method import Split, placed
from der_fast.training.model import Model
from der_fast.training.packing import Packed, packed_extractor, packed_network, schedule_of
from der_fast.training.rehearsal import new_names
from der_fast.training.state import CLASSIFIER, REPRESENTATION, StepState


class Replay:
    """See `der_fast.training.method.Method`."""

    joint = False
    figures: Mapping[str, tuple[str, str]] = {}

    def begin(self, context: Context, model: Model, train: ImageSource) -> StepState:
        """Take over the extractor; the classifier grows."""
        step, network = len(model.class_sets) + 1, model.network
        extractor = Extractor(network.architecture).initialise(generator(context.seed, "extractor", step))
        if network.dense is not None:
            extractor.load_state_dict(network.dense)
        classes = len(model.class_names) + len(new_names(model, train))
        head = grow_classifier(network.head, extractor.features, classes, generator(context.seed, "classifier", step))
        return placed(context, StepState(step, {"extractor": extractor, "head": head}))

    def split(self, context: Context, model: Model, train: ImageSource) -> Split:
        """All of them, none held out."""
        return train, None

    def train(self, context: Context, model: Model, state: StepState, source: ImageSource) -> None:
        """The representation stage."""
        if state.stage == REPRESENTATION:
            CrossEntropyStage(context, state, source, schedule_of(context, state.step)).run()
            state.drop_gradients()

    def pack(self, context: Context, model: Model, state: StepState, source: ImageSource) -> Packed:
        """Fold batch-norm into the extractor, which replaces the previous one."""
        newest = packed_extractor(context, state, source)
        if state.stage != CLASSIFIER:
            state.enter(CLASSIFIER)
            context.save(state)
        return packed_network(state, model.network, FrozenBank(), newest)

    def finish(self, context: Context, model: Model, state: StepState, source: ImageSource, held: ImageSource | None) -> None:
        """The classifier stage."""
        if has_classifier_stage(context, state.step):
            train_classifier(context, state, model.network.bank, source)

    def readout(self, context: Context, model: Model, state: StepState) -> Readout:
        """The linear classifier."""
        return classifier_readout(context, state)

    def facts(self, context: Context, state: StepState, packed: Packed) -> dict[str, Any]:
        """No figures besides those of every run."""
        return {}

    def label(self, config: Config) -> str:
        """'without expansion'."""
        return "without expansion"
