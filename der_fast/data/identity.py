"""What identifies an image, wherever it is and whatever its name: a short checksum of its file, or of its pixels.

A file of up to 64 KiB is read whole. For a longer one, its length and four blocks of 16 KiB count, spread evenly from its beginning to its
end, so that a million photos are distinguished without being read in full. The checksum is eight bytes of BLAKE2b: among a million images,
the probability that two different ones collide is one in ten million.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from der_fast.data.catalogue.file_table import Int64s
from der_fast.data.decode.pixels import decode_files
from der_fast.data.io.members import split_member
from der_fast.data.io.threads import mapped
from der_fast.data.photos import PhotoSource
from der_fast.data.source import ImageSource

# Images in files are identified by the files' bytes, all others by their pixels.
FILE, PIXELS = "file", "pixels"
# Stands for an image that could not be read; no image has this identity.
UNREADABLE = 0

_WHOLE = 1 << 16
_BLOCK = 1 << 14
_BLOCKS = 4
_CHUNK = 64


def kind_of(source: ImageSource) -> str:
    """Return what identifies the images of a source: `FILE` or `PIXELS`."""
    return FILE if isinstance(source, PhotoSource) else PIXELS


def identities(source: ImageSource, kind: str, indices: Tensor | None = None) -> Int64s | None:
    """Return an identity for every image.

    Args:
        source: the images.
        kind: `FILE` or `PIXELS`. Files can be decoded and so compared with images in memory, but not the other way round.
        indices: (n,) int64: which images; None = all.

    Returns:
        (n,) int64, `UNREADABLE` for an image that could not be read; None if the source has no files.

    Raises:
        DataError: a drive does not answer.
    """
    chosen = torch.arange(len(source)) if indices is None else indices
    if isinstance(source, PhotoSource):
        paths = [source.table.path(row) for row in source.rows[chosen.numpy()].tolist()]
        if kind == FILE:
            found = mapped(_of_chunk, _chunks(paths), source.library.settings.timeout)
            return np.concatenate([np.zeros(0, np.int64), *found])
        return _in_chunks(chosen, lambda part: _of_decoded(source, part))
    return None if kind == FILE else _in_chunks(chosen, lambda part: of_pixels(source.pixels(part)))


def of_pixels(images: Tensor) -> Int64s:
    """Return the identities of images given as uint8, N × H × W × 3."""
    shape = f"{images.shape[1]}x{images.shape[2]}:".encode()
    return np.array([_short(shape, image.data) for image in np.ascontiguousarray(images.numpy())], dtype=np.int64)


def of_file(path: str) -> int:
    """Return the identity of a file, or of an image in a tar; `UNREADABLE` if it cannot be read."""
    member = split_member(path)
    try:
        # As everywhere, never wait for a pipe or a device.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        with os.fdopen(os.open(path if member is None else member[0], flags), "rb", buffering=0) as file:
            facts = os.fstat(file.fileno())
            start, size = (0, facts.st_size) if member is None else member[1:]
            if not stat.S_ISREG(facts.st_mode) or size == 0:
                return UNREADABLE
            parts = []
            for offset, length in _blocks(size):
                file.seek(start + offset)
                parts.append(file.read(length))
    except OSError:
        return UNREADABLE
    return _short(size.to_bytes(8, "little"), *parts)


def _blocks(size: int) -> list[tuple[int, int]]:
    if size <= _WHOLE:
        return [(0, size)]
    return [((size - _BLOCK) * number // (_BLOCKS - 1), _BLOCK) for number in range(_BLOCKS)]


def _short(*parts: bytes | memoryview) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return int.from_bytes(digest.digest(), "little", signed=True) or 1


def _chunks(paths: Sequence[str]) -> list[list[str]]:
    return [list(paths[start : start + _CHUNK]) for start in range(0, len(paths), _CHUNK)]


def _of_chunk(paths: Sequence[str]) -> Int64s:
    return np.fromiter(map(of_file, paths), np.int64, len(paths))


def _in_chunks(chosen: Tensor, read: Callable[[Tensor], Int64s]) -> Int64s:
    return np.concatenate([np.zeros(0, np.int64), *(read(chosen[start : start + _CHUNK]) for start in range(0, len(chosen), _CHUNK))])


def _of_decoded(source: PhotoSource, part: Tensor) -> Int64s:
    decoded = decode_files([Path(source.table.path(row)) for row in source.rows[part.numpy()].tolist()], source.image_size)
    found = np.full(len(part), UNREADABLE, dtype=np.int64)
    found[decoded.kept] = of_pixels(decoded.images)
    return found
