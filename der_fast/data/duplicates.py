"""Which images of a source another source already holds."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from der_fast.data.io.members import read_bytes
from der_fast.data.io.threads import mapped
from der_fast.data.memory_source import MemorySource
from der_fast.data.photos import PhotoSource
from der_fast.data.source import ImageSource


def held_already(source: ImageSource, memory: ImageSource) -> Tensor:
    """Return for every image whether `memory` holds the same one, in any class: boolean (N,).

    Images in memory are compared by their pixels, files by their contents (only files of equal size are read). Sources of different
    kinds, and sources from outside der_fast, are assumed to have none in common.

    Raises:
        DataError: a file's bytes did not come in time.
    """
    if isinstance(source, MemorySource) and isinstance(memory, MemorySource):
        there = {_checksum(image) for image in memory.images}
        return torch.tensor([_checksum(image) in there for image in source.images], dtype=torch.bool)
    if isinstance(source, PhotoSource) and isinstance(memory, PhotoSource):
        return _files_held(source, memory)
    return torch.zeros(len(source), dtype=torch.bool)


def _checksum(image: Tensor) -> bytes:
    return hashlib.sha256(image.numpy().data).digest()


def _files_held(source: PhotoSource, memory: PhotoSource) -> Tensor:
    alike = np.isin(source.table.sizes[source.rows], memory.table.sizes[memory.rows]).nonzero()[0]
    paths = [source.table.path(int(source.rows[position])) for position in alike]
    theirs = [memory.table.path(row) for row in memory.rows.tolist()]
    timeout = source.library.settings.timeout
    known = memory.library.digests
    there = {known[path] for path in theirs if path in known}
    there.update(mapped(_digest, [path for path in theirs if path not in known], timeout))
    held = torch.zeros(len(source), dtype=torch.bool)
    for position, digest in zip(alike.tolist(), mapped(_digest, paths, timeout), strict=True):
        # An unreadable file equals no other.
        held[position] = bool(digest) and digest in there
    return held


def _digest(path: str) -> str:
    try:
        return hashlib.sha256(read_bytes(path)).hexdigest()
    except OSError:
        return ""
