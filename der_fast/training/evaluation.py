"""Features, logits and accuracy of a finished model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from der_fast.compaction.bank import FrozenBank
from der_fast.data.source import Batch, ImageSource
from der_fast.errors import DataError
from der_fast.model.readout import Readout
from der_fast.training.context import Context


@dataclass(frozen=True)
class Evaluation:
    """Accuracy on a test set.

    Attributes:
        top1, top5: percent; top5 counts the five best of all known classes (100 while there are five or fewer).
        class_set_top1: percent for every step's classes, None for a step without test images.
        confusion: C × C counts, rows the true class, columns the predicted one, in learning order.
        images: number of test images.
        class_names: the known classes in learning order.
        without_images: the known classes without test images.
        left_out: images that were given but not counted because the run was trained on them.
        notes: what else the user should know about the measurement, one line each.
    """

    top1: float
    top5: float
    class_set_top1: list[float | None]
    confusion: list[list[int]]
    images: int
    class_names: tuple[str, ...]
    without_images: tuple[str, ...] = ()
    left_out: int = 0
    notes: tuple[str, ...] = ()


def _test_batches(context: Context, source: ImageSource, work: str, order: Tensor | None = None) -> Iterator[Batch]:
    done = 0
    context.observer.images_pass(work, 0, len(source))
    for batch in context.test_batches(source, order):
        yield batch
        done += len(batch.labels)
        context.observer.images_pass(work, done, len(source))


def features_by_class(context: Context, bank: FrozenBank, source: ImageSource) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Go through the images class by class in one pass, with the test transform; at most one class and one batch are held at a time.

    Yields:
        For every class with a readable image: its label, the positions (n,) of its readable images in the source, in order, and
        their super-features (n, F); on the CPU.
    """
    order = source.labels.argsort(stable=True)
    label, positions, rows = -1, [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0)]
    for batch in _test_batches(context, source, "herding", order):
        with torch.no_grad():
            features = context.features(bank, batch.images).cpu()
        for found in sorted(set(batch.labels.tolist())):
            part = (batch.labels == found).cpu()
            if found != label:
                if label >= 0:
                    yield label, torch.cat(positions), torch.cat(rows)
                label, positions, rows = found, [], []
            positions.append(batch.indices[part])
            rows.append(features[part])
    if label >= 0:
        yield label, torch.cat(positions), torch.cat(rows)


@torch.no_grad()
def logits_of(context: Context, bank: FrozenBank, readout: Readout, source: ImageSource, work: str = "evaluation") -> tuple[Tensor, Tensor]:
    """Return the logits (n, classes) of all readable images, with the test transform, and their positions (n,); on the CPU.

    Args:
        context, bank, readout, source: what computes them, and the images.
        work: name of this work for the observer.

    Raises:
        DataError: no image could be read.
    """
    rows: list[Tensor] = []
    positions: list[Tensor] = []
    for batch in _test_batches(context, source, work):
        rows.append(readout(context.features(bank, batch.images)).cpu())
        positions.append(batch.indices)
    if not rows:
        raise DataError(f"none of the {len(source)} image(s) could be read")
    return torch.cat(rows), torch.cat(positions)


def score(logits: Tensor, labels: Tensor, class_names: Sequence[str], class_sets: Sequence[Sequence[str]]) -> Evaluation:
    """Count hits.

    Args:
        logits: (N, C).
        labels: (N,) int64 in [0, C).
        class_names: C names.
        class_sets: the names that arrived in each step.
    """
    classes = len(class_names)
    best = logits.topk(min(5, classes), 1).indices
    hit1 = best[:, 0] == labels
    hit5 = (best == labels[:, None]).any(1)
    sets: list[float | None] = []
    start = 0
    for names in class_sets:
        inside = (labels >= start) & (labels < start + len(names))
        sets.append(100 * float(hit1[inside].double().mean()) if bool(inside.any()) else None)
        start += len(names)
    counts = torch.bincount(labels * classes + best[:, 0], minlength=classes**2).reshape(classes, classes)
    return Evaluation(
        100 * float(hit1.double().mean()),
        100 * float(hit5.double().mean()),
        sets,
        counts.tolist(),
        len(labels),
        tuple(class_names),
        tuple(name for name, row in zip(class_names, counts.tolist(), strict=True) if not sum(row)),
    )
