"""One pass over image files: what is read, in which batches, with which random numbers; and what every reader returns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from der_fast.data.augment.draws import Floats, Ints, brightness, flips, uniform, windows_of
from der_fast.data.augment.transform import Transform
from der_fast.data.catalogue.file_table import FileTable
from der_fast.data.read.place import BEGINNING, Place
from der_fast.kernels.augment import augment


@dataclass(frozen=True)
class ReadSettings:
    """How files are read; none of these changes the images, their order or their crops.

    Args:
        reader: 'dali' or 'pillow'.
        workers: threads (dali) or processes (pillow; 0 = in this process) that decode.
        prefetch: batches decoded ahead.
        timeout: seconds to wait for a batch before giving up.
        hardware_load: share of JPEGs for the GPU's own decoder.
        width_hint, height_hint: size of the largest images, to make GPU decoding buffers in advance; 0 = none.
        cache_gib: budget of the resident cache in GiB; 0 = none, None = half of the free memory on a GPU, none on the CPU.
    """

    reader: str
    workers: int
    prefetch: int = 2
    timeout: float = 120.0
    hardware_load: float = 0.65
    width_hint: int = 0
    height_hint: int = 0
    cache_gib: float | None = None


@dataclass(frozen=True)
class Walk:
    """One pass.

    Args:
        table: the files.
        rows: (N,) every image's row in the table.
        batches: positions of the images (into `rows`), batch by batch; for the whole pass, wherever it starts.
        batch_size: most images in a batch.
        key: key of the epoch's random numbers; None for evaluation.
        transform: size, jitter, mean and std.
        dtype: of the result: floating (normalised) or uint8 (not normalised).
        device: where the result is wanted; a reader may leave it elsewhere.
        start: the place in the pass where reading starts.
    """

    table: FileTable
    rows: Ints
    batches: Sequence[Ints]
    batch_size: int
    key: int | None
    transform: Transform
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    start: Place = BEGINNING

    @property
    def rest(self) -> list[tuple[int, Ints]]:
        """The batches to read, each with its number in the pass, 0-based."""
        return list(enumerate(self.batches))[self.start.batches :]

    @property
    def resized(self) -> tuple[int, int]:
        """(height, width) to which windows are resized, before the centre crop of an evaluation."""
        return self.transform.size if self.key is not None else self.transform.stored_size

    @property
    def jitters(self) -> bool:
        """Whether brightness factors are drawn."""
        return self.key is not None and self.transform.brightness > 0

    def path(self, position: int) -> str:
        """Return the path of the image at a position."""
        return self.table.path(int(self.rows[position]))

    def numbers(self, positions: Ints) -> Floats | None:
        """Return the random numbers of these images, None in evaluation."""
        return None if self.key is None else uniform(self.key, positions)

    def windows(self, numbers: Floats | None, heights: Ints, widths: Ints) -> Ints:
        """Return the window (top, left, height, width) of every image to decode: (N, 4), in pixels."""
        return windows_of(numbers, heights, widths)

    def flips(self, numbers: Floats | None, count: int) -> NDArray[np.bool_]:
        """Return which images are mirrored: (count,)."""
        return flips(numbers) if numbers is not None and self.transform.flip else np.zeros(count, dtype=bool)

    def factors(self, numbers: Floats | None, count: int) -> Floats:
        """Return every image's brightness factor: (count,)."""
        return brightness(numbers, self.transform.brightness) if numbers is not None and self.jitters else np.ones(count)

    def finished(self, pixels: Tensor, numbers: Floats | None) -> Tensor:
        """Mirror, jitter and, if the result is floating, normalise decoded pixels.

        Args:
            pixels: uint8, n × H × W × 3.
            numbers: (n, 24) or None.

        Returns:
            n × H × W × 3 of `dtype`, on the device of `pixels`.
        """
        count, device = len(pixels), pixels.device
        mirrored = torch.from_numpy(self.flips(numbers, count)).to(device)
        factors = torch.from_numpy(self.factors(numbers, count)).float().to(device)
        if self.dtype == torch.uint8:
            pixels = torch.where(mirrored[:, None, None, None], pixels.flip(2), pixels)
            return brightened(pixels, factors[:, None, None, None]) if self.jitters else pixels
        nowhere = torch.zeros(count, dtype=torch.int64, device=device)
        images = augment(
            pixels,
            row=nowhere,
            col=nowhere,
            flip=mirrored,
            brightness=factors,
            padding=0,
            mean=self.transform.mean,
            std=self.transform.std,
            dtype=self.dtype,
        )
        return images.permute(0, 2, 3, 1)


def brightened(pixels: Tensor, factor: Tensor | float) -> Tensor:
    """Return uint8 pixels times `factor` (which broadcasts), rounded and clipped to [0, 255]."""
    return (pixels.float() * factor).clamp_(0, 255).round_().to(torch.uint8)


@dataclass(frozen=True)
class Loaded:
    """One batch as a reader returns it.

    Args:
        images: n × H × W × 3, ready for the network except for the device.
        positions: (n,) the images' positions in the source.
        number: of the batch in the pass, 0-based.
        problems: (path, reason) of every image that could not be read.
    """

    images: Tensor
    positions: Ints
    number: int
    problems: Sequence[tuple[str, str]] = ()


class Reader(Protocol):
    """What decodes files."""

    name: str

    def read(self, walk: Walk) -> Iterator[Loaded]:
        """Yield the batches of a walk in order, from its start.

        Raises:
            DataError: a batch did not arrive within the timeout, or the decoder died.
        """
        ...

    def close(self) -> None:
        """Let go of threads, processes and buffers."""
        ...
