"""Joining sources of different kinds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from der_fast.data.decode.pixels import decode_files
from der_fast.data.memory_source import MemorySource
from der_fast.data.photos import PhotoSource
from der_fast.data.source import ImageSource


def joined(sources: Sequence[ImageSource], names: Sequence[str]) -> ImageSource:
    """Join sources, labelled into `names`; images in files are decoded if others are in memory."""
    if len({source.in_files for source in sources}) > 1:
        sources = [in_memory(source) for source in sources]
    whole, *others = [source.relabelled(names) for source in sources]
    for source in others:
        whole = whole.concatenated(source)
    return whole


def in_memory(source: ImageSource) -> MemorySource:
    """Return a source with its images decoded at its image size; files that cannot be read are left out and named in `skipped`."""
    if isinstance(source, MemorySource):
        return source
    if isinstance(source, PhotoSource):
        paths = [Path(source.table.path(row)) for row in source.rows.tolist()]
        decoded = decode_files(paths, source.image_size)
        kept = torch.tensor(decoded.kept, dtype=torch.int64)
        return MemorySource(decoded.images, source.labels[kept], source.class_names, skipped=decoded.problems)
    return MemorySource(source.pixels(torch.arange(len(source))), source.labels, source.class_names)
