"""Removing a class: its row of the classifier, its exemplars, its name. What extractors learned from its images stays in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from der_fast.data.source import ImageSource
from der_fast.errors import DataError
from der_fast.model.classifier import keep_classes
from der_fast.training.model import Model
from der_fast.training.rename import check_known
from der_fast.training.sources import counts_by_class

REMAINS = (
    "what remains: the extractors (and the newest one's dense weights) were trained on images of what was forgotten and are not changed; "
    "files that were exported before, and copies of the run, still know it; the data set itself is not touched"
)


def forgotten_model(model: Model, names: Sequence[str]) -> Model:
    """Return the model without the classes `names`; the given one is left unchanged.

    The other classes keep their rows of the classifier and therefore their logits. A step that loses all its classes keeps its
    extractor, whose features the classifier reads for the other classes, and its number: later steps are not renumbered.

    Raises:
        DataError: no names, an unknown one, or no class would be left.
    """
    if not names:
        raise DataError("name at least one class to forget")
    check_known(names, model.class_names)
    left = [name for name in model.class_names if name not in names]
    if not left:
        raise DataError("the last known classes cannot be forgotten, because a model needs at least one; delete the run's folder instead")
    assert model.network.head is not None
    stays = [position for position, name in enumerate(model.class_names) if name not in names]
    rows = torch.tensor(stays, device=model.network.head.weight.device)
    network = replace(model.network, head=keep_classes(model.network.head, rows))
    sets = [tuple(name for name in step if name not in names) for step in model.class_sets]
    return replace(model, network=network, readout=model.ready.of_classes(rows), memory=_without(model.memory, left), class_sets=sets)


def _without(memory: ImageSource | None, left: Sequence[str]) -> ImageSource | None:
    if memory is None:
        return None
    counts = counts_by_class(memory)
    present = [name for name in left if counts.get(name)]
    return memory.of_classes(present).relabelled(left) if present else None
