"""How a stage's images reach its batch step: which tensors change from batch to batch, and what the step makes of them on the device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from der_fast.data.read.place import Place
from der_fast.data.resident import ResidentImages
from der_fast.data.resident import on_device as resident_images
from der_fast.data.shards import shuffled
from der_fast.data.source import ImageSource
from der_fast.training.batch_step import on_device
from der_fast.training.context import Context
from der_fast.training.kept import KeptFeatures


@dataclass(frozen=True)
class Fed:
    """One batch on its way to the step.

    Attributes:
        tensors: what the step is called with.
        images: number of images.
        place: where the pass is after this batch; None if it cannot continue there.
    """

    tensors: tuple[Tensor, ...]
    images: int
    place: Place | None


class Feed(Protocol):
    """Delivers a stage's batches."""

    def epoch(self, number: int, draws: torch.Generator, start: Place) -> Iterator[Fed]:
        """Yield the batches of epoch `number` (0-based) from `start` on; `draws` shuffles and augments."""
        ...

    def inputs(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return a batch's images and labels, and what else the loss takes, from what the step was called with; runs inside the step."""
        ...


class LoadedFeed:
    """Images come from their source batch by batch, augmented; see `Feed`.

    Args:
        context: settings.
        source: the images.
        chosen: positions (n,) of those to train on; default: all.
        size: images per batch.
        kept: features of the frozen extractors, which the loss takes after images and labels; None: none are kept.
    """

    def __init__(self, context: Context, source: ImageSource, chosen: Tensor | None, size: int, kept: KeptFeatures | None = None) -> None:
        self.context, self.source, self.chosen, self.size, self.kept = context, source, chosen, size, kept

    def epoch(self, number: int, draws: torch.Generator, start: Place) -> Iterator[Fed]:
        """Yield the batches of an epoch; see `Feed.epoch`."""
        kept = self.kept
        view = None if kept is None else kept.enter(number)
        for batch in self.context.training_batches(self.source, self.chosen, self.size, draws, start, view=view):
            more = () if kept is None else (kept.complete(batch),)
            yield Fed((batch.images, batch.labels, *more), len(batch.labels), batch.place)

    def inputs(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return images, labels and kept features; see `Feed.inputs`."""
        images, labels, *rows = tensors
        return images, labels, *(self.kept.gather(row) for row in rows if self.kept is not None)


class ResidentFeed:
    """Images lie on the device as uint8: a batch is their positions, and the step indexes, augments and normalises; see `Feed`.

    Args:
        context: settings.
        images: the source's images on the device.
        chosen: positions (n,) of those to train on; default: all.
        size: images per batch.
        kept: as for `LoadedFeed`.
    """

    def __init__(
        self, context: Context, images: ResidentImages, chosen: Tensor | None, size: int, kept: KeptFeatures | None = None
    ) -> None:
        self.context, self.images, self.size, self.kept = context, images, size, kept
        self.order = torch.arange(len(images)) if chosen is None else chosen

    def epoch(self, number: int, draws: torch.Generator, start: Place) -> Iterator[Fed]:
        """Yield the batches of an epoch; see `Feed.epoch`."""
        order = shuffled(self.order, draws, self.size, torch.zeros(len(self.images), dtype=torch.int32))
        view = None if self.kept is None else self.kept.enter(number)
        self.images.begin(self.context.view_of(view).key_of(draws))
        yield from _slices(order, self.size, start, self.context.device)

    def inputs(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return images, labels and kept features; see `Feed.inputs`."""
        (positions,) = tensors
        images, labels = self.images.batch(positions)
        return images, labels, *(() if self.kept is None else (self.kept.gather(self.kept.rows_of(positions)),))


class FeatureFeed:
    """A stage that trains on kept features alone: the step is called with rows, and the loss takes features instead of images; see `Feed`.

    Args:
        context: settings.
        kept: the features.
        labels: (n,) int64: the labels of the kept rows.
        size: images per batch.
    """

    def __init__(self, context: Context, kept: KeptFeatures, labels: Tensor, size: int) -> None:
        self.context, self.kept, self.size = context, kept, size
        self.labels = labels.to(context.device)

    def epoch(self, number: int, draws: torch.Generator, start: Place) -> Iterator[Fed]:
        """Yield the batches of an epoch; see `Feed.epoch`."""
        self.kept.enter(number)
        rows = self.kept.readable()
        order = shuffled(rows, draws, self.size, torch.zeros(len(self.labels), dtype=torch.int32))
        yield from _slices(order, self.size, start, self.context.device)

    def inputs(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return features and labels; see `Feed.inputs`."""
        (rows,) = tensors
        return self.kept.gather(rows), self.labels.index_select(0, rows)


def feed_for(context: Context, source: ImageSource, chosen: Tensor | None, size: int, kept: KeptFeatures | None = None) -> Feed:
    """Return the feed of a stage that trains on images: from the device if its kernels run there and the images fit, else loaded.

    Args:
        context, source, chosen, size, kept: as for `LoadedFeed`.
    """
    if on_device(context) and context.device.type == "cuda":
        layout = context.config.runtime.channels_last
        say = context.observer.message
        images = resident_images(source, context.train_transform, context.device, context.dtype, say, channels_last=layout)
        if images is not None:
            return ResidentFeed(context, images, chosen, size, kept)
    return LoadedFeed(context, source, chosen, size, kept)


def _slices(order: Tensor, size: int, start: Place, device: torch.device) -> Iterator[Fed]:
    """Yield an epoch's positions, batch by batch; they go to the device once, and nothing waits for them."""
    if device.type == "cuda":
        order = order.pin_memory().to(device, non_blocking=True)
    for number in range(start.batches, -(-len(order) // size)):
        part = order[number * size : (number + 1) * size]
        yield Fed((part,), len(part), Place(number + 1))
