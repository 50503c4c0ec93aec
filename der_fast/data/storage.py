"""Saving a source with a run and finding it again: pixels, or for files their relative paths, sizes and checksums instead."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from der_fast.data.catalogue.file_table import FileTable
from der_fast.data.io.members import is_same_size, read_bytes
from der_fast.data.io.threads import mapped
from der_fast.data.memory_source import MemorySource
from der_fast.data.photos import PhotoSource
from der_fast.data.read.library import Library
from der_fast.data.read.walk import ReadSettings
from der_fast.data.source import ImageSource
from der_fast.errors import DataError, Spelling

_MOST_NAMED = 5
_DIGEST_BYTES = 32


def record_of(source: ImageSource) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a source as tensors and plain JSON values; files without a known checksum are read for it.

    Raises:
        DataError: a file's bytes did not come in time.
    """
    if isinstance(source, PhotoSource):
        tensors, facts = _record_of_files(source)
        return tensors, {"files": facts}
    return {"images": source.pixels(torch.arange(len(source))), "labels": source.labels}, {"class_names": list(source.class_names)}


def _record_of_files(source: PhotoSource) -> tuple[dict[str, Tensor], dict[str, Any]]:
    table = source.table.taken(source.rows)
    paths = [table.path(row) for row in range(len(table))]
    digests = source.library.digests
    missing = [path for path in paths if path not in digests]
    digests.update(zip(missing, mapped(_digest, missing, source.library.settings.timeout), strict=True))
    tensors = {
        "names": torch.from_numpy(table.names.copy()),
        "ends": torch.from_numpy(table.ends),
        "folder": torch.from_numpy(table.folder),
        "sizes": torch.from_numpy(table.sizes.copy()),
        "sha256": torch.tensor([list(bytes.fromhex(digests[path])) for path in paths], dtype=torch.uint8),
        "labels": source.labels,
    }
    facts = {"roots": list(table.roots), "folders": [list(entry) for entry in table.folders], "image_size": list(source.image_size)}
    return tensors, {**facts, "class_names": list(source.class_names)}


def from_record(tensors: dict[str, Tensor], facts: dict[str, Any], settings: ReadSettings) -> ImageSource:
    """The inverse of `record_of`; it does not check that the files still exist.

    Args:
        tensors, facts: what `record_of` returned.
        settings: how files are read.

    Raises:
        KeyError, TypeError, ValueError: these are not such a record.
    """
    if "files" in facts:
        return _from_files(tensors, facts["files"], Library(settings))
    return MemorySource(tensors["images"], tensors["labels"], facts["class_names"])


def _from_files(tensors: dict[str, Tensor], facts: dict[str, Any], library: Library) -> PhotoSource:
    table = FileTable(
        tuple(facts["roots"]),
        tuple((int(root), str(path)) for root, path in facts["folders"]),
        tensors["folder"].numpy(),
        tensors["names"].numpy(),
        tensors["ends"].numpy(),
        tensors["sizes"].numpy(),
    )
    for row, digest in enumerate(tensors["sha256"].numpy()):
        library.digests[table.path(row)] = digest.tobytes().hex()
    size = (int(facts["image_size"][0]), int(facts["image_size"][1]))
    return PhotoSource.of(table, np.arange(len(table)), tensors["labels"], facts["class_names"], size, library)


def located(source: ImageSource, places: Sequence[str]) -> ImageSource:
    """Return the source with its files where they are now; images in memory are returned as they are.

    A root whose files are gone is looked for at `places`. A few files that are missing or changed count as unreadable.

    Args:
        source: from `from_record`.
        places: folders where a root may have been moved to.

    Raises:
        DataError: more than three and more than 1 % of the files are gone, or have other contents; or a drive does not answer.
    """
    if not isinstance(source, PhotoSource):
        return source
    table, digests = source.table, dict(source.library.digests)
    for root in table.roots:
        if not _bearable(_missing(table, source), len(source)):
            moved = next((found for place in places if _bearable(_missing(found := table.moved(root, place), source), len(source))), None)
            table = moved or table
    gone = _missing(table, source)
    if not _bearable(gone, len(source)):
        raise DataError(
            f"{len(gone)} of {len(source)} images of the rehearsal memory are not where they were, or have another size: "
            f"{', '.join(gone[:_MOST_NAMED])} …. Put them back, or give the new place of the data set: ",
            Spelling("as DATA of `der-fast train`, with --data of `der-fast learn`", "as data of train() or learn_run()"),
        )
    for row in range(len(table)):
        digests[table.path(row)] = source.library.digests[source.table.path(row)]
    changed = _changed(table, source, digests, set(gone))
    if not _bearable(changed, len(source)):
        raise DataError(
            f"{len(changed)} of {len(source)} images of the rehearsal memory have other contents than when they were chosen: "
            f"{', '.join(changed[:_MOST_NAMED])} …. Restore them, or train again"
        )
    for path in changed:
        source.library.say(f"the rehearsal memory's {path} has other contents than when it was chosen")
    source.library.digests.update(digests)
    return replace(source, table=table)


def _bearable(problems: Sequence[str], count: int) -> bool:
    return len(problems) <= max(3, count // 100) and (len(problems) < count or not count)


def _missing(table: FileTable, source: PhotoSource) -> list[str]:
    paths = [table.path(row) for row in source.rows.tolist()]
    sizes = dict(zip(paths, table.sizes[source.rows].tolist(), strict=True))
    there = mapped(lambda path: is_same_size(Path(path), sizes[path]), paths, source.library.settings.timeout)
    return [path for path, found in zip(paths, there, strict=True) if not found]


def _changed(table: FileTable, source: PhotoSource, digests: dict[str, str], gone: set[str]) -> list[str]:
    paths = [path for path in (table.path(row) for row in source.rows.tolist()) if path not in gone]
    found = mapped(_digest, paths, source.library.settings.timeout)
    return [path for path, digest in zip(paths, found, strict=True) if digest != digests[path]]


def _digest(path: str) -> str:
    """Return the SHA-256 of a file's contents; zeros if it cannot be read."""
    try:
        return hashlib.sha256(read_bytes(path)).hexdigest()
    except OSError:
        return "0" * (2 * _DIGEST_BYTES)
