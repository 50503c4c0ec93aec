"""Images held in memory: an `ImageSource` of pixels and labels."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from der_fast.data.augment.transform import Transform
from der_fast.data.io.names import spelled
from der_fast.data.read.place import BEGINNING, Place
from der_fast.data.selection import check_indices, check_names, positions_of, selection_of
from der_fast.data.shards import check_process, shuffled
from der_fast.data.source import Batch, check_same_names
from der_fast.errors import DataError


class MemorySource:
    """Images held in memory as uint8.

    Args:
        images: uint8, N × H × W × 3, on the CPU.
        labels: integers, N, each a position in `class_names`; kept as int64.
        class_names: distinct names; a class may have no images.
        files: a name for every image, used in messages.
        skipped: files that could not be read, each as "path: reason".
        notes: what the report should mention.

    Attributes:
        groups: (N,) int32: 0 for the images a source started with, 1 for the next ones appended, and so on.
        rank, world: which shard of an epoch is read.

    Raises:
        DataError: a wrong shape or dtype, a label out of range, repeated class names; the message names the image.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        class_names: Sequence[str],
        *,
        files: Sequence[str] | None = None,
        skipped: Sequence[str] = (),
        notes: Sequence[str] = (),
    ) -> None:
        self._class_names = tuple(map(spelled, class_names))
        self._files = None if files is None else tuple(files)
        self.skipped = tuple(skipped)
        self.notes = tuple(notes)
        self._fingerprint: str | None = None
        _check_images(images)
        check_names(self._class_names)
        self._labels = _checked_labels(labels, images.shape[0], self._class_names, self._files)
        self._images = images.contiguous()
        self.groups = torch.zeros(len(self._labels), dtype=torch.int32)
        self.rank, self.world = 0, 1

    @property
    def images(self) -> Tensor:
        """The pixels, uint8, N × H × W × 3, on the CPU; read-only."""
        return self._images

    @property
    def labels(self) -> Tensor:
        """Labels, int64, N, on the CPU; read-only."""
        return self._labels

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes; a label is a position in here."""
        return self._class_names

    @property
    def in_files(self) -> bool:
        """Whether the images stay in their files: no."""
        return False

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Zeros, (N,) int64: there are no files."""
        return np.zeros(len(self), dtype=np.int64)

    @property
    def roots(self) -> tuple[str, ...]:
        """None: there are no files."""
        return ()

    @property
    def files(self) -> tuple[str, ...] | None:
        """A name for every image, or None."""
        return self._files

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the stored images in pixels."""
        return int(self._images.shape[1]), int(self._images.shape[2])

    def __len__(self) -> int:
        """Return the number of images."""
        return int(self._images.shape[0])

    def __repr__(self) -> str:
        """Say how many images of which size and how many classes there are."""
        height, width = self.image_size
        return f"MemorySource({len(self)} images of {height} × {width}, {len(self.class_names)} classes)"

    def of_classes(self, names: Sequence[str]) -> MemorySource:
        """Return the images of these classes only; see `ImageSource.of_classes`."""
        chosen, labels = selection_of(self._labels, self._class_names, names)
        return self._with(chosen, labels, tuple(names))

    def relabelled(self, class_names: Sequence[str]) -> MemorySource:
        """Return the same images with labels into `class_names`; see `ImageSource.relabelled`."""
        return self.with_labels(positions_of(self._class_names, class_names)[self._labels], class_names)

    def with_labels(self, labels: Tensor, class_names: Sequence[str]) -> MemorySource:
        """Return the same images with other labels; see `ImageSource.with_labels`."""
        source = MemorySource(self._images, labels, class_names, files=self._files, skipped=self.skipped, notes=self.notes)
        return source._dealt(self.groups, self.rank, self.world)

    def subset(self, indices: Tensor) -> MemorySource:
        """Return the images at `indices`; see `ImageSource.subset`."""
        indices = check_indices(indices, len(self))
        return self._with(indices, self._labels[indices], self._class_names)

    def concatenated(self, other: MemorySource) -> MemorySource:
        """Return the images of this source followed by those of `other`; see `ImageSource.concatenated`."""
        if not isinstance(other, MemorySource):
            raise DataError(
                f"cannot join images in memory with {type(other).__name__}; load both the same way: data.reader='memory' holds "
                "folders in memory too"
            )
        check_same_names(self, other)
        files = self._files + other._files if self._files is not None and other._files is not None else None
        source = MemorySource(
            torch.cat([self._images, other._images]),
            torch.cat([self._labels, other._labels]),
            self._class_names,
            files=files,
            skipped=tuple(dict.fromkeys(self.skipped + other.skipped)),
            notes=tuple(dict.fromkeys(self.notes + other.notes)),
        )
        behind = int(self.groups.max()) + 1 if len(self) else 0
        return source._dealt(torch.cat([self.groups, torch.full_like(other.groups, behind)]), self.rank, self.world)

    def sharded(self, rank: int, world: int) -> MemorySource:
        """Return the source as process `rank` of `world` reads it; see `ImageSource.sharded`."""
        check_process(rank, world)
        return self.with_labels(self._labels, self._class_names)._dealt(self.groups, rank, world)

    def pixels(self, indices: Tensor) -> Tensor:
        """Return the images at `indices`; see `ImageSource.pixels`."""
        return self._images.index_select(0, check_indices(indices, len(self)))

    def say(self, line: str) -> None:
        """Add a line to the notes, once."""
        self.notes = tuple(dict.fromkeys([*self.notes, line]))

    def recall(self, unreadable: dict[str, str]) -> dict[str, str]:
        """Return `unreadable` unchanged: images in memory have all been read already."""
        return unreadable

    def fingerprint(self) -> str:
        """Return the SHA-256 over pixels, labels and class names; computed once."""
        if self._fingerprint is None:
            digest = hashlib.sha256(json.dumps([self._class_names, list(self._images.shape)]).encode())
            digest.update(self._labels.numpy().astype("<i8").tobytes())
            digest.update(self._images.numpy().reshape(-1).data)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

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
        """Go through the images once; see `ImageSource.batches`."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        if generator is None and (shuffle or transform.draws):
            raise ValueError("shuffling and augmentation need a torch.Generator: without one the result could not be repeated")
        order = torch.arange(len(self)) if indices is None else check_indices(indices, len(self))
        if shuffle:
            assert generator is not None
            order = shuffled(order, generator, batch_size, self.groups, self.rank, self.world)
        key = transform.key_of(generator)
        return self._walk(order, batch_size, transform, key, device, channels_last, start.batches)

    def _walk(
        self,
        order: Tensor,
        batch_size: int,
        transform: Transform,
        key: int | None,
        device: str | torch.device,
        channels_last: bool,
        behind: int,
    ) -> Iterator[Batch]:
        rest = order[behind * batch_size :]
        # Cheap for a whole epoch, and hardly cheaper for a batch.
        drawn = None if key is None else transform.draw(key, rest, self.image_size)
        for start in range(0, len(rest), batch_size):
            chosen = rest[start : start + batch_size]
            pixels = self._images.index_select(0, chosen)
            part = None if drawn is None else drawn.at(start, start + batch_size)
            images = transform(pixels, part, device=device, channels_last=channels_last)
            yield Batch(images, self._labels[chosen].to(device), chosen, Place(behind + start // batch_size + 1))

    def _with(self, indices: Tensor, labels: Tensor, names: tuple[str, ...]) -> MemorySource:
        files = None if self._files is None else tuple(self._files[index] for index in indices.tolist())
        source = MemorySource(self._images.index_select(0, indices), labels, names, files=files, skipped=self.skipped, notes=self.notes)
        return source._dealt(self.groups[indices], self.rank, self.world)

    def _dealt(self, groups: Tensor, rank: int, world: int) -> MemorySource:
        """Set the groups and the shard of a new source, and return it."""
        self.groups, self.rank, self.world = groups, rank, world
        return self


def _check_images(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[3] != 3 or 0 in images.shape[1:3]:
        raise DataError(
            f"images must be uint8, N × H × W × 3 (RGB, 0–255), not {images.dtype}, {tuple(images.shape)}; "
            "der_fast.data.from_dataset converts other forms"
        )
    if images.device.type != "cpu":
        raise DataError(f"images must be on the CPU, not on {images.device}; batches are moved to the device automatically")


def _checked_labels(labels: Tensor, count: int, names: tuple[str, ...], files: tuple[str, ...] | None) -> Tensor:
    if labels.shape != (count,) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise DataError(f"labels must hold one integer per image ({count}), not {labels.dtype}, {tuple(labels.shape)}")
    if files is not None and len(files) != count:
        raise DataError(f"there are {count} images but {len(files)} file names")
    labels = labels.to("cpu", torch.int64)
    wrong = ((labels < 0) | (labels >= len(names))).nonzero().flatten()
    if len(wrong):
        first = int(wrong[0])
        where = f" ({files[first]})" if files is not None else ""
        raise DataError(
            f"label {int(labels[first])} of image {first}{where} is out of range: labels must lie in 0 … {len(names) - 1} "
            f"for {len(names)} classes; {len(wrong)} of {count} labels are wrong"
        )
    return labels
