"""Typed access to a table read from JSON: wrong types are refused with the key's name, absent keys are recorded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from der_fast.errors import RESUME, CheckpointError

Values = tuple[float | None, ...]


class Fields:
    """The keys of one JSON table.

    Attributes:
        source: the table itself.
        missing: one sentence for everything absent or too short; grows as keys are read.
    """

    def __init__(self, source: Mapping[str, Any], file: Path) -> None:
        self.source = source
        self.file = file
        self.missing: list[str] = []

    def _refuse(self, key: str, expected: str, value: Any) -> CheckpointError:
        shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "…"
        return CheckpointError(
            f"{self.file}: {key!r} should be {expected}, not {shown}. The file is damaged or belongs to another program."
        )

    def _number(self, key: str, value: Any) -> float | None:
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._refuse(key, "a number", value)
        return value

    def _list(self, key: str) -> list[Any]:
        value = self.source.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self._refuse(key, "a list", value)
        return value

    def list_length(self, key: str) -> int:
        """Return the length of the list `key`, 0 if it is absent."""
        return len(self._list(key))

    def number(self, key: str, default: float | None = None) -> float | None:
        """Return a number, or `default` if the key is absent or null."""
        value = self._number(key, self.source.get(key))
        return default if value is None else value

    def text(self, key: str, default: str) -> str:
        """Return a text, or `default` if the key is absent, null or empty."""
        value = self.source.get(key)
        return str(value) if value not in (None, "") else default

    def texts(self, key: str) -> tuple[str, ...]:
        """Return a list of texts."""
        return tuple(str(value) for value in self._list(key))

    def tables(self, key: str) -> tuple[Mapping[str, Any], ...]:
        """Return a list of tables, empty if the key is absent."""
        rows = self._list(key)
        if not all(isinstance(row, dict) for row in rows):
            raise self._refuse(key, "a list of tables", rows)
        return tuple(rows)

    def mapping(self, key: str) -> Mapping[str, Any]:
        """Return a table, empty if the key is absent."""
        value = self.source.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self._refuse(key, "a table", value)
        return value

    def values(self, key: str) -> Values:
        """Return a list of at least one number; raises CheckpointError if there is none."""
        values = tuple(self._number(key, value) for value in self._list(key))
        if not values:
            raise CheckpointError(
                f"{self.file} has no {key!r}: no step has finished, so there is nothing to report. Continue the run (", RESUME, ")."
            )
        return values

    def per_step(self, key: str, steps: int, needed: bool = True) -> Values:
        """Return one number per step, padded with None (and reported as missing, if `needed`) if there are too few."""
        values = tuple(self._number(key, value) for value in self._list(key))[:steps]
        if len(values) < steps and needed:
            found = f"has {len(values)} of {steps} values" if values else "is absent"
            self.missing.append(f"{key}: {found} in metrics.json.")
        return values + (None,) * (steps - len(values))

    def numbers(self, declared: type, **defaults: float | None) -> dict[str, Any]:
        """Return a number, or its default, for every figure that a dataclass declares (`der_fast.training.figures`)."""
        return {each.name: self.number(each.name, defaults.get(each.name)) for each in dataclasses.fields(declared)}

    def lists(self, declared: type, steps: int) -> dict[str, Any]:
        """Return one number per step, as `per_step` does, for every figure that a dataclass declares."""
        return {each.name: self.per_step(each.name, steps, each.metadata["needed"]) for each in dataclasses.fields(declared)}

    def steps(self, finished: int) -> tuple[tuple[str, ...], ...]:
        """Return the class names of every finished step; raises CheckpointError if they are absent or too few."""
        steps = self._list("steps")[:finished]
        if len(steps) < finished or not all(isinstance(names, list) for names in steps) or not any(steps):
            raise self._refuse("steps", f"a list of {finished} lists of class names, one per value of 'top1'", self.source.get("steps"))
        return tuple(tuple(str(name) for name in names) for names in steps)

    def class_sets(self, finished: int) -> tuple[Values, ...]:
        """Return row t = accuracies of class sets 1…t after step t; empty (and reported as missing) if rows are absent or too short."""
        rows = self._list("class_set_top1")[:finished]
        if len(rows) < finished or any(not isinstance(row, list) or len(row) < step for step, row in enumerate(rows, 1)):
            self.missing.append("Accuracy per class set: 'class_set_top1' is absent from metrics.json or incomplete.")
            return ()
        return tuple(tuple(self._number("class_set_top1", value) for value in row[:step]) for step, row in enumerate(rows, 1))

    def confusion(self, classes: int) -> tuple[tuple[int, ...], ...]:
        """Return the square matrix of counts; empty (and reported as missing) if it is absent or its size is not `classes`."""
        rows = self._list("confusion")
        if len(rows) != classes or any(not isinstance(row, list) or len(row) != classes for row in rows):
            found = f"has {len(rows)} rows for {classes} classes" if rows else "is absent from metrics.json"
            self.missing.append(f"Confusion matrix: it {found}.")
            return ()
        return tuple(tuple(int(self._number("confusion", value) or 0) for value in row) for row in rows)

    def kept(self, finished: int) -> tuple[Mapping[str, tuple[int, int]], ...]:
        """Return, per step, group name → (kept, total) channels; an empty table for a step without masks."""
        rows = self._list("kept")[:finished]
        rows = rows + [{}] * (finished - len(rows))
        return tuple(self._kept_of_step(row or {}) for row in rows)

    def _kept_of_step(self, row: Any) -> Mapping[str, tuple[int, int]]:
        if not isinstance(row, dict):
            raise self._refuse("kept", "a list of tables {group: [kept, total]}", row)
        table: dict[str, tuple[int, int]] = {}
        for group, pair in row.items():
            if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(count, int) for count in pair):
                raise self._refuse(f"kept.{group}", "[kept, total]", pair)
            table[str(group)] = (pair[0], pair[1])
        return table
