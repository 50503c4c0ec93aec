"""Reads results: JSON lines as the runner writes them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Key = tuple[str, tuple[tuple[str, str], ...], str]


class ResultsError(ValueError):
    """A results file cannot be read; the message says which line and why."""


def read(path: Path) -> list[Record]:
    """Return every record of a file, in order.

    Raises:
        ResultsError: the file is missing, or a line is not a record.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ResultsError(f"cannot read {path}: {error.strerror or error}") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            # An interrupted run may leave half a line at the end; everything before it counts.
            if number == len(lines):
                break
            raise ResultsError(f"{path}, line {number}: not JSON ({error}); the file is damaged") from error
        if not isinstance(record, dict) or record.get("kind") not in ("run", "result"):
            raise ResultsError(f'{path}, line {number}: not a record of this benchmark ("kind" must be "run" or "result")')
        found.append(record)
    return found


def runs(records: Iterable[Record]) -> list[Record]:
    """Return the runs' own records."""
    return [record for record in records if record["kind"] == "run"]


def key_of(record: Record) -> Key:
    """Return what identifies a measurement: case, parameters, variant."""
    return record["case"], tuple((name, str(value)) for name, value in record["params"].items()), record["variant"]


def latest(records: Iterable[Record]) -> dict[Key, Record]:
    """Return the last record of every measurement that succeeded; a later failure removes an earlier result."""
    found: dict[Key, Record] = {}
    for record in records:
        if record["kind"] != "result":
            continue
        if record["status"] == "ok":
            found[key_of(record)] = record
        elif record["status"] == "failed":
            found.pop(key_of(record), None)
    return found


def failures(records: Iterable[Record]) -> list[Record]:
    """Return what failed and was not measured successfully later."""
    last: dict[Key, Record] = {}
    for record in records:
        if record["kind"] == "result":
            last[key_of(record)] = record
    return [record for record in last.values() if record["status"] == "failed"]


def select(records: Iterable[Record], case: str, variant: str | None = None, **params: object) -> list[Record]:
    """Return the measurements of a case with the given parameters."""
    wanted = {name: str(value) for name, value in params.items()}
    return [
        record
        for record in latest(records).values()
        if record["case"] == case
        and (variant is None or record["variant"] == variant)
        and all(str(record["params"].get(name)) == value for name, value in wanted.items())
    ]


def by_variant(records: Sequence[Record]) -> Mapping[tuple[str, str], dict[str, Record]]:
    """Group measurements by case and parameters; inside, by variant."""
    found: dict[tuple[str, str], dict[str, Record]] = {}
    for record in latest(records).values():
        found.setdefault((record["case"], params_text(record)), {})[record["variant"]] = record
    return found


def params_text(record: Record) -> str:
    """Return 'stage 1, batch 128'."""
    return ", ".join(f"{name} {value}" for name, value in record["params"].items())
