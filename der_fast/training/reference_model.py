"""The model that forward transfer is measured against (eq. 17): random start, cross-entropy only, the same images."""

from __future__ import annotations

from dataclasses import replace

from der_fast.compaction.bank import FrozenBank
from der_fast.data.source import ImageSource
from der_fast.model.classifier import new_classifier
from der_fast.model.extractor import Extractor
from der_fast.model.readout import linear_readout
from der_fast.seeds import generator
from der_fast.training.context import Context
from der_fast.training.cross_entropy import CrossEntropyStage
from der_fast.training.evaluation import logits_of, score
from der_fast.training.model import Model
from der_fast.training.packing import schedule_of
from der_fast.training.progress import EpochRecord
from der_fast.training.rehearsal import rehearsal
from der_fast.training.state import StepState


def train_reference(context: Context, model: Model, train: ImageSource, test: ImageSource | None) -> tuple[float | None, list[EpochRecord]]:
    """Train the reference model of a step on D̃_t; return its top-1 accuracy, in percent, on the step's new classes, and its epochs.

    Args:
        context: settings and listeners; nothing is saved.
        model: the model before the step (its memory belongs to D̃_t).
        train: the new classes' images.
        test: test images; without any of a new class, nothing is trained and the accuracy is None.
    """
    new = [name for name in train.class_names if name not in model.class_names]
    if test is None or any(name not in test.class_names for name in new):
        return None, []
    step = len(model.class_sets) + 1
    source = rehearsal(model, train)
    extractor = Extractor(model.network.architecture).initialise(generator(context.seed, "reference", step)).to(context.device)
    head = new_classifier(extractor.features, len(source.class_names), generator(context.seed, "reference classifier", step))
    state = StepState(step, {"extractor": extractor, "head": head.to(context.device)})
    silent = replace(context, save=lambda state: None)
    CrossEntropyStage(silent, state, source, schedule_of(context, step), name="reference").run()
    images = test.of_classes(new).relabelled(source.class_names)
    logits, read = logits_of(context, FrozenBank([extractor]), linear_readout(head), images)
    return score(logits, images.labels[read], source.class_names, [source.class_names]).top1, state.records
