"""Images that stay in their files: an `ImageSource` of paths and labels, decoded when a batch is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from der_fast.data.augment.draws import Ints
from der_fast.data.augment.transform import Transform
from der_fast.data.catalogue.file_table import FileTable
from der_fast.data.decode.pixels import decode_files
from der_fast.data.io.names import spelled
from der_fast.data.read.library import Library
from der_fast.data.read.place import BEGINNING, Place
from der_fast.data.read.walk import Walk
from der_fast.data.selection import check_indices, check_names, positions_of, selection_of
from der_fast.data.shards import check_process, shuffled
from der_fast.data.source import Batch, check_same_names
from der_fast.errors import DataError


@dataclass(frozen=True, eq=False)
class PhotoSource:
    """Image files with labels.

    Args:
        table: the files; several sources share one.
        rows: (N,) int64: every image's row in the table.
        labels: int64, N, on the CPU: positions in `class_names`.
        class_names: distinct names.
        image_size: (height, width) in pixels to which images are resized in evaluation, before the centre crop.
        library: what reads the files.
        groups: (N,) int32: 0 for the images a source started with, 1 for the next ones appended, and so on; shards get
            equal parts of every group.
        rank, world: which shard of an epoch is read.
    """

    table: FileTable
    rows: Ints
    labels: Tensor
    class_names: tuple[str, ...]
    image_size: tuple[int, int]
    library: Library
    groups: Tensor
    rank: int = 0
    world: int = 1

    @staticmethod
    def of(
        table: FileTable, rows: Ints, labels: Tensor, class_names: Sequence[str], image_size: tuple[int, int], library: Library
    ) -> PhotoSource:
        """Make a source of one group."""
        return PhotoSource(
            table, rows, labels, tuple(map(spelled, class_names)), image_size, library, torch.zeros(len(rows), dtype=torch.int32)
        )

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.rows)

    def __repr__(self) -> str:
        """Say how many images and classes there are, and where."""
        return f"PhotoSource({len(self)} images in {', '.join(self.table.roots)}, {len(self.class_names)} classes)"

    @property
    def files(self) -> tuple[str, ...]:
        """Every image's path below its root."""
        return tuple(self.table.relative(row) for row in self.rows.tolist())

    @property
    def in_files(self) -> bool:
        """Whether the images stay in their files: yes."""
        return True

    @property
    def sizes(self) -> Ints:
        """Bytes of every image's file, (N,) int64."""
        return self.table.sizes[self.rows]

    @property
    def roots(self) -> tuple[str, ...]:
        """The folders that hold the files."""
        return self.table.roots

    @property
    def skipped(self) -> tuple[str, ...]:
        """Files of this data set that could not be read so far, each as "path: reason"."""
        return tuple(f"{path}: {reason}" for path, reason in self.library.broken.items())

    @property
    def notes(self) -> tuple[str, ...]:
        """How the images are read, for the report."""
        return tuple(self.library.notes)

    def say(self, line: str) -> None:
        """Add a line to the notes, once, and report it."""
        self.library.say(line)

    def recall(self, unreadable: dict[str, str]) -> dict[str, str]:
        """Return path → reason of the files of this data set that could not be read; it is updated as more are found.

        Args:
            unreadable: what an interrupted run had found; files that have moved since are left to be found again.
        """
        roots = [Path(root) for root in self.table.roots]
        here = {path: reason for path, reason in unreadable.items() if any(Path(path).is_relative_to(root) for root in roots)}
        self.library.broken.update(here)
        return self.library.broken

    def of_classes(self, names: Sequence[str]) -> PhotoSource:
        """Return the images of these classes only; see `ImageSource.of_classes`."""
        chosen, labels = selection_of(self.labels, self.class_names, names)
        return replace(self._taken(chosen), labels=labels, class_names=tuple(map(spelled, names)))

    def relabelled(self, class_names: Sequence[str]) -> PhotoSource:
        """Return the same images with labels into `class_names`; see `ImageSource.relabelled`."""
        return self.with_labels(positions_of(self.class_names, class_names)[self.labels], class_names)

    def with_labels(self, labels: Tensor, class_names: Sequence[str]) -> PhotoSource:
        """Return the same images with other labels; see `ImageSource.with_labels`."""
        names = tuple(map(spelled, class_names))
        check_names(names)
        return replace(self, labels=labels, class_names=names)

    def subset(self, indices: Tensor) -> PhotoSource:
        """Return the images at `indices`; see `ImageSource.subset`."""
        return self._taken(check_indices(indices, len(self)))

    def _taken(self, indices: Tensor) -> PhotoSource:
        return replace(self, rows=self.rows[indices.numpy()], labels=self.labels[indices], groups=self.groups[indices])

    def concatenated(self, other: PhotoSource) -> PhotoSource:
        """Return the images of this source followed by those of `other`; see `ImageSource.concatenated`."""
        if not isinstance(other, PhotoSource):
            raise DataError(
                f"cannot join image files with images in memory ({type(other).__name__}); load both the same way: data.reader="
                "'memory' holds folders in memory too"
            )
        check_same_names(self, other)
        same = other.table is self.table
        shift = 0 if same else len(self.table)
        self.library.digests.update(other.library.digests)
        last = int(self.groups.max()) + 1 if len(self) else 0
        return replace(
            self,
            table=self.table if same else self.table.joined(other.table.taken(other.rows)),
            rows=np.concatenate([self.rows, other.rows if same else np.arange(len(other)) + shift]),
            labels=torch.cat([self.labels, other.labels]),
            groups=torch.cat([self.groups, torch.full_like(other.groups, last)]),
        )

    def sharded(self, rank: int, world: int) -> PhotoSource:
        """Return the source as process `rank` of `world` reads it; see `ImageSource.sharded`.

        An unreadable file is missing only in its own process: a batch may be smaller there than the batch of the same number elsewhere, or
        left out if fewer than two of its images were read. A batch's `place` gives its number.
        """
        check_process(rank, world)
        return replace(self, rank=rank, world=world)

    def fingerprint(self) -> str:
        """Return the SHA-256 over class names, labels, and the files' relative paths and sizes: the same wherever the folder is."""
        digest = hashlib.sha256(json.dumps(self.class_names).encode())
        digest.update(self.labels.numpy().astype("<i8").tobytes())
        digest.update(self.table.checksum(self.rows).encode())
        return digest.hexdigest()

    def pixels(self, indices: Tensor) -> Tensor:
        """Return the images at `indices`; see `ImageSource.pixels`."""
        rows = self.rows[check_indices(indices, len(self)).numpy()].tolist()
        return decode_files([Path(self.table.path(row)) for row in rows], self.image_size, timeout=self.library.settings.timeout).images

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
        dtype: torch.dtype = torch.float32,
    ) -> Iterator[Batch]:
        """Go through the images once; see `ImageSource.batches`.

        Args:
            indices, batch_size, transform, generator, shuffle, device, channels_last, start: as there; the transform must use
                random-resized-crop.
            dtype: of the images: floating (normalised) or uint8 (not normalised).
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        if generator is None and (shuffle or transform.draws):
            raise ValueError("shuffling and augmentation need a torch.Generator: without one the result could not be repeated")
        if not transform.random_resized_crop or transform.stored_size != self.image_size:
            raise DataError(
                f"image files are read for {self.image_size[0]} × {self.image_size[1]} pixels and random-resized-crop, not for {transform}"
            )
        order = torch.arange(len(self)) if indices is None else check_indices(indices, len(self))
        if shuffle:
            assert generator is not None
            order = shuffled(order, generator, batch_size, self.groups, self.rank, self.world)
        parts = [order[at : at + batch_size].numpy() for at in range(0, len(order), batch_size)]
        walk = Walk(self.table, self.rows, parts, batch_size, transform.key_of(generator), transform, dtype, torch.device(device), start)
        return self._walk(walk, channels_last, shuffle and batch_size > 1)

    def _walk(self, walk: Walk, channels_last: bool, needs_two: bool) -> Iterator[Batch]:
        alone = len(walk.batches) == 1 and len(walk.batches[0]) == 1
        faults = walk.start.faults
        for loaded in self.library.read(walk):
            count, faults = len(loaded.positions), faults + len(loaded.problems)
            # After unreadable images, what is left of a batch may be too little for batch-norm.
            if count == 0 or (needs_two and count == 1 and not alone):
                continue
            images = loaded.images.to(walk.device, non_blocking=True).permute(0, 3, 1, 2)
            positions = torch.from_numpy(loaded.positions)
            labels = self.labels[positions].to(walk.device)
            yield Batch(images if channels_last else images.contiguous(), labels, positions, Place(loaded.number + 1, faults))
