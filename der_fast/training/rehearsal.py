"""The rehearsal memory: how a step trains on it, and how it is filled again."""

from __future__ import annotations

import torch

from der_fast.data.source import ImageSource
from der_fast.training.context import Context
from der_fast.training.evaluation import features_by_class
from der_fast.training.memory import herding, quota, truncate
from der_fast.training.model import Model


def labelled(model: Model, train: ImageSource) -> ImageSource:
    """Return the images labelled over all seen classes in learning order."""
    return train.relabelled((*model.class_names, *new_names(model, train)))


def new_names(model: Model, train: ImageSource) -> tuple[str, ...]:
    """Return the names of the new classes."""
    return tuple(name for name in train.class_names if name not in model.class_names)


def rehearsal(model: Model, train: ImageSource) -> ImageSource:
    """Return D̃_t: the new images and the memory, labelled over all seen classes in learning order."""
    named = labelled(model, train)
    if model.memory is None:
        return named
    return named.concatenated(model.memory.relabelled(named.class_names))


def refill(context: Context, model: Model, memory: ImageSource | None, train: ImageSource) -> ImageSource | None:
    """Shrink the memory to the new quota and choose the best exemplars of the classes of `train`, by herding.

    Args:
        context: settings.
        model: the finished model, which already knows the new classes.
        memory: the memory before this step.
        train: the new classes' images, and more images of known classes, which compete with the memory's.
    """
    names = model.class_names
    count = quota(context.config.memory, len(names))
    if not count:
        return None
    parts = []
    if memory is not None:
        kept, whole = truncate(memory, count).relabelled(names), memory.relabelled(names)
        again = torch.tensor([names.index(name) for name in train.class_names if name in memory.class_names], dtype=torch.int64)
        parts = [kept.subset(torch.isin(kept.labels, again, invert=True).nonzero().flatten())]
        rivals = torch.isin(whole.labels, again).nonzero().flatten()
        if len(rivals):
            train = train.relabelled(names).concatenated(whole.subset(rivals))
    largest = 0
    for _, positions, features in features_by_class(context, model.network.bank, train):
        parts.append(train.subset(positions[herding(features, count)]).relabelled(names))
        # Herding ranks in double precision, twice: as given and normalised.
        largest = max(largest, features.numel() * (features.element_size() + 2 * 8))
    if train.in_files:
        train.say(f"herding over {len(train):,} images, class by class: at most {largest / 2**20:.1f} MiB of features at a time")
    chosen = parts[0]
    for part in parts[1:]:
        chosen = chosen.concatenated(part)
    return chosen
