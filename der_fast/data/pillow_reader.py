"""Decoding with Pillow in worker processes, for where nvidia-dali is not installed."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from der_fast.data.decode import Pixels, reason_of, to_rgb
from der_fast.data.draws import Ints
from der_fast.data.encoded import open_upright
from der_fast.data.members import read_bytes
from der_fast.data.reading import Loaded, ReadSettings, Walk
from der_fast.errors import DataError

_Part = tuple[Pixels, Ints, list[tuple[str, str]]]


class _Batches(Dataset[_Part]):
    """The batches of a walk, decoded when they are asked for."""

    def __init__(self, walk: Walk) -> None:
        self.walk = walk

    def __len__(self) -> int:
        return max(len(self.walk.batches) - self.walk.start.batches, 0)

    def __getitem__(self, number: int) -> _Part:
        return decode_batch(self.walk, self.walk.batches[self.walk.start.batches + number])


def decode_batch(walk: Walk, positions: Ints) -> _Part:
    """Return the pixels (uint8, n × H × W × 3) of one batch, their positions, and (path, reason) of every file that cannot be read."""
    pixels = np.empty((len(positions), *walk.transform.size, 3), dtype=np.uint8)
    numbers = walk.numbers(positions)
    kept: list[int] = []
    problems: list[tuple[str, str]] = []
    for index, position in enumerate(positions.tolist()):
        path = walk.path(position)
        try:
            image = open_upright(read_bytes(path))
            width, height = image.size
            own = None if numbers is None else numbers[index : index + 1]
            window = walk.windows(own, np.array([height]), np.array([width]))[0]
            pixels[len(kept)] = _cut(image, window.tolist(), walk)
        except MemoryError:
            raise
        except Exception as error:  # damaged bytes make the decoders raise almost anything
            problems.append((path, reason_of(error)))
        else:
            kept.append(position)
    return pixels[: len(kept)], np.array(kept, dtype=np.int64), problems


def _cut(image: Image.Image, window: list[int], walk: Walk) -> Pixels:
    """Resize a window of an image and cut off what an evaluation's centre crop leaves out."""
    top, left, height, width = window
    rows, columns = walk.resized
    full = image.size
    # A JPEG can be decoded at half its size and less; what is resized stays at least twice as large as wanted.
    image.draft(None, (-(-2 * columns * full[0] // width), -(-2 * rows * full[1] // height)))
    x, y = image.size[0] / full[0], image.size[1] / full[1]
    box = (left * x, top * y, min((left + width) * x, image.size[0]), min((top + height) * y, image.size[1]))
    pixels = np.asarray(to_rgb(image).resize((columns, rows), Image.Resampling.BILINEAR, box=box))
    height, width = walk.transform.size
    top, left = (rows - height) // 2, (columns - width) // 2
    return pixels[top : top + height, left : left + width]


def _as_it_is(part: Any) -> Any:
    # Arrays travel through pipes: the shared memory that tensors take is often scarce in containers.
    return part


def _leave_interrupts(worker: int) -> None:
    """Let Ctrl-C, which reaches every process of a terminal, be for the main process alone: it lets its workers go."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class PillowReader:
    """Reads with Pillow; see `Reader`.

    Args:
        settings: `workers`, `prefetch` and `timeout` are used.
    """

    name = "pillow"

    def __init__(self, settings: ReadSettings) -> None:
        self.settings = settings

    def read(self, walk: Walk) -> Iterator[Loaded]:
        """Yield the batches of a walk in order; see `Reader.read`."""
        batches = _Batches(walk)
        workers = min(self.settings.workers, len(batches))
        loader = DataLoader(
            batches,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=workers,
            prefetch_factor=self.settings.prefetch if workers else None,
            timeout=self.settings.timeout if workers else 0,
            worker_init_fn=_leave_interrupts if workers else None,
        )
        try:
            for number, (pixels, positions, problems) in enumerate(loader, walk.start.batches):
                yield Loaded(walk.finished(torch.from_numpy(pixels), walk.numbers(positions)), positions, number, problems)
        except RuntimeError as error:
            if "DataLoader" not in str(error):
                raise
            raise DataError(
                f"reading images failed: {error}. A process that decodes images died or waited longer than data.timeout="
                f"{self.settings.timeout:g} seconds; check the drive and the free memory, or set data.workers lower"
            ) from error

    def close(self) -> None:
        """Nothing outlives a walk."""
