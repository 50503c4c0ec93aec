"""The file beside a run that remembers what a data set holds.

It is used as long as it fits the data set. Otherwise the data set is listed and the file is written again.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from der_fast.data.catalogue.file_table import FileTable
from der_fast.data.catalogue.kinds import READABLE_KINDS
from der_fast.errors import StorageError
from der_fast.files import write_bytes

FORMAT = 3


@dataclass(frozen=True)
class CachedIndex:
    """What a data set holds. Subclasses add (N,) int64 arrays and JSON values; a field with a default is not kept in the file.

    Args:
        table: N files below one root.
    """

    table: FileTable


Index = TypeVar("Index", bound=CachedIndex)


def save_index(path: Path, index: CachedIndex) -> None:
    """Write an index; raises StorageError."""
    table = index.table
    kept = {name: getattr(index, name) for name in _kept(type(index))}
    columns: dict[str, Any] = {name: value for name, value in kept.items() if isinstance(value, np.ndarray)}
    facts = {name: value for name, value in kept.items() if name not in columns} | {
        "format": FORMAT,
        "readable": READABLE_KINDS,
        "root": table.roots[0],
        "folders": [entry for _, entry in table.folders],
        "checksum": table.checksum(np.arange(len(table))),
    }
    text = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, facts=text, folder=table.folder.astype(np.int32), names=table.names, ends=table.ends, sizes=table.sizes, **columns)
    write_bytes(path, buffer.getvalue())


def load_index(path: Path, kind: type[Index]) -> Index | None:
    """Read an index; None where there is none, or none that verifies."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = dict(archive)
        facts = json.loads(arrays["facts"].tobytes())
        # Which files are images depends on what else is installed.
        if (facts["format"], facts["readable"]) != (FORMAT, list(READABLE_KINDS)):
            return None
        folders = tuple((0, entry) for entry in facts["folders"])
        folder = arrays["folder"].astype(np.int64)
        table = FileTable((facts["root"],), folders, folder, arrays["names"], arrays["ends"], arrays["sizes"])
        columns = {name: arrays[name] for name in _kept(kind) if name in arrays}
        whole = table.checksum(np.arange(len(table))) == facts["checksum"] and all(len(column) == len(table) for column in columns.values())
        return kind(table, **columns, **{name: _tuples(facts[name]) for name in _kept(kind) if name not in columns}) if whole else None
    except Exception:  # a damaged archive raises almost anything; the data set can be listed again
        return None


def load_or_make(
    path: Path | None, kind: type[Index], check: Callable[[Index], Index | str], make: Callable[[], Index]
) -> tuple[Index, str]:
    """Return an index, from its file if that fits the data set, and a line that says where it came from.

    Args:
        path: the file; None keeps none. Where it cannot be written, the line says why.
        kind: what the file holds.
        check: returns the index to use, or why the file's does not fit ('' for another data set's).
        make: lists the data set.
    """
    reason = ""
    if path is not None and (old := load_index(path, kind)) is not None:
        found = check(old)
        if not isinstance(found, str):
            return found, f"{found}: {path}"
        reason = found
    index = make()
    note = f"{index} made{f' again: {reason}' if reason else ''}"
    if path is not None:
        try:
            save_index(path, index)
        except StorageError as error:
            note += f"; not saved: {error}"
    return index, note


def _kept(kind: type[CachedIndex]) -> list[str]:
    return [field.name for field in fields(kind) if field.default is MISSING and field.name != "table"]


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
