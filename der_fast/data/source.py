"""Labelled images that training reads in batches: the seam between where images are and what learns from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from der_fast.data.augment.transform import Transform
from der_fast.data.read.place import BEGINNING, Place
from der_fast.data.selection import few
from der_fast.errors import DataError

Source = TypeVar("Source", bound="ImageSource")


@dataclass(frozen=True)
class Batch:
    """One batch, ready for the network.

    Args:
        images: floating, N × 3 × H × W, normalised, on the requested device.
        labels: int64, N, on the same device: positions in the source's `class_names`.
        indices: int64, N, on the CPU: positions of the images in the source.
        place: where the pass is after this batch; None if its source cannot continue in the middle of a pass.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    place: Place | None = None


class ImageSource(Protocol):
    """Images with labels, wherever they are.

    Every method that returns a source leaves this one unchanged.
    """

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes; a label is a position in here."""
        ...

    @property
    def labels(self) -> Tensor:
        """Labels, int64, N, on the CPU."""
        ...

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels at which images are stored, or to which files of any size are resized in evaluation."""
        ...

    @property
    def in_files(self) -> bool:
        """Whether the images stay in their files, of any size, and are decoded for every batch."""
        ...

    @property
    def files(self) -> tuple[str, ...] | None:
        """A name for every image, its path below its root if it has one; None if images have no names."""
        ...

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Bytes of every image's file, (N,) int64; zeros for images in memory."""
        ...

    @property
    def roots(self) -> tuple[str, ...]:
        """The folders that hold the files; none for images in memory."""
        ...

    @property
    def world(self) -> int:
        """How many processes share an epoch; see `sharded`."""
        ...

    @property
    def skipped(self) -> tuple[str, ...]:
        """Files that could not be read, each as "path: reason"."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What the report should mention."""
        ...

    def say(self, line: str) -> None:
        """Add a line to the notes, once."""
        ...

    def recall(self, unreadable: dict[str, str]) -> dict[str, str]:
        """Take over path → reason of the files that an interrupted run could not read.

        Returns:
            What is known now, in a dictionary that is updated as more are found.
        """
        ...

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def of_classes(self: Source, names: Sequence[str]) -> Source:
        """Return the images of these classes only, relabelled so that `class_names` is `names`.

        Raises:
            DataError: an unknown or repeated name, or a class without images.
        """
        ...

    def relabelled(self: Source, class_names: Sequence[str]) -> Source:
        """Return the same images with labels into `class_names`, which must hold every name of this source.

        Raises:
            DataError: a name of this source is missing, or a name is repeated.
        """
        ...

    def with_labels(self: Source, labels: Tensor, class_names: Sequence[str]) -> Source:
        """Return the same images with other labels, (N,) int64 into other class names.

        Raises:
            DataError: a name is repeated.
        """
        ...

    def subset(self: Source, indices: Tensor) -> Source:
        """Return the images at `indices` (int64, any length, in this order) with the same class names.

        Raises:
            DataError: an index out of range.
        """
        ...

    def concatenated(self: Source, other: Source) -> Source:
        """Return the images of this source followed by those of `other`.

        Raises:
            DataError: other class names or another image size.
        """
        ...

    def sharded(self: Source, rank: int, world: int) -> Source:
        """Return the source as process `rank` of `world` reads it.

        With `shuffle`, `batches` then gives every process a different share of each epoch: all get the same number of batches and images,
        no image goes to two, and the numbers from every part joined by `concatenated` (new images, rehearsal memory) differ by at most
        one. Fewer images than there are processes are left out, different ones in every epoch. Processes must use the same seed. Without
        `shuffle`, and in every other method, all images are returned.

        Raises:
            ValueError: no such process.
        """
        ...

    def fingerprint(self) -> str:
        """Return the SHA-256 (hexadecimal) over labels, class names, and pixels, or for files their relative paths and sizes."""
        ...

    def pixels(self, indices: Tensor) -> Tensor:
        """Return the images at `indices` as uint8, n × `image_size` × 3, on the CPU; unreadable ones are left out."""
        ...

    def batches(
        self,
        indices: Tensor | None,
        batch_size: int,
        *,
        transform: Transform,
        generator: torch.Generator | None = None,
        shuffle: bool = False,
        device: str | torch.device = "cpu",
        channels_last: bool = True,
        start: Place = BEGINNING,
    ) -> Iterator[Batch]:
        """Go through the images once.

        An unreadable image is left out of its batch, so only a batch's `indices` say which images it holds.

        Args:
            indices: int64: which images; None = all.
            batch_size: images per batch; the last batch may be smaller.
            transform: what is done to the pixels.
            generator: CPU generator that decides shuffling and augmentation; equal seeds give equal batches, bit for bit on
                the CPU, on one kind of processor.
            shuffle: draw a new order, for training. A last batch of a single image is then left out if it is not the only one, because
                batch-norm cannot train on one value.
            device: device of images and labels.
            channels_last: memory layout of the images.
            start: where to begin, as given by a batch of the same pass: what follows is what would have followed there, bit for bit on the
                CPU, on one kind of processor. The generator must be in the same state as at the start of that pass.

        Raises:
            DataError: an index out of range.
            ValueError: batch_size below 1, or shuffling without a generator.
        """
        ...


def renamed(source: ImageSource, names: Mapping[str, str]) -> ImageSource:
    """Return a source whose classes are renamed by `names` (old → new); classes that are not in it keep theirs.

    Raises:
        DataError: two classes would have the same name.
    """
    wanted = tuple(names.get(name, name) for name in source.class_names)
    return source if wanted == source.class_names else source.with_labels(source.labels, wanted)


def check_same_names(one: ImageSource, other: ImageSource) -> None:
    """Refuse to join sources with different class names or image sizes; raises DataError."""
    if other.class_names != one.class_names:
        raise DataError(
            f"cannot join sources: their class names differ ({few(one.class_names)} and {few(other.class_names)}); use relabelled() first"
        )
    if other.image_size != one.image_size:
        raise DataError(f"cannot join sources: images of {one.image_size} and of {other.image_size} pixels; load both at the same size")
