"""Compares two results files: how much faster or slower every measurement became."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.harness.records import Key, Record, latest, params_text, runs


@dataclass(frozen=True)
class Change:
    """One measurement in both files.

    Attributes:
        case, params, variant: identify the measurement.
        before, after: milliseconds.
        ratio: before / after; above 1 is faster.
        clear: whether the 20th to 80th percentiles do not overlap; otherwise the difference may be noise.
    """

    case: str
    params: str
    variant: str
    before: float
    after: float
    ratio: float
    clear: bool


@dataclass(frozen=True)
class Comparison:
    """What two files have in common, and what is only in one of them, as texts."""

    changes: list[Change]
    only_before: list[str]
    only_after: list[str]
    warnings: list[str]


def compare(before: Sequence[Record], after: Sequence[Record]) -> Comparison:
    """Compare the last successful measurement of every variant."""
    one, other = latest(before), latest(after)
    changes = []
    for key in one.keys() & other.keys():
        a, b = one[key], other[key]
        apart = a["ms_p80"] < b["ms_p20"] or b["ms_p80"] < a["ms_p20"]
        changes.append(Change(a["case"], params_text(a), a["variant"], a["ms"], b["ms"], a["ms"] / b["ms"], apart))
    changes.sort(key=lambda change: (change.case, change.params, change.variant))
    return Comparison(changes, _only_in(one, other), _only_in(other, one), _warnings(before, after))


def _only_in(one: Mapping[Key, Record], other: Mapping[Key, Record]) -> list[str]:
    return sorted(_name(record) for key, record in one.items() if key not in other)


def _name(record: Record) -> str:
    return f"{record['case']}[{params_text(record)}] {record['variant']}"


def _warnings(before: Sequence[Record], after: Sequence[Record]) -> list[str]:
    """Return what makes results incomparable."""
    found = []
    devices = [{record["device"] for record in records if record["kind"] == "result"} for records in (before, after)]
    if devices[0] != devices[1]:
        found.append(f"different devices: {', '.join(sorted(devices[0]))} and {', '.join(sorted(devices[1]))}")
    if any(record["facts"]["kind"] == "cpu" for record in runs([*before, *after])):
        found.append("measured on a CPU: this says nothing about a GPU")
    if any(record["scale"] == "smoke" for record in runs([*before, *after])):
        found.append("smoke runs are not measurements: tiny shapes, one sample")
    return found


def text(comparison: Comparison) -> str:
    """Return the comparison as text."""
    lines = [f"warning: {warning}" for warning in comparison.warnings]
    if comparison.changes:
        lines.append("time before / after; above 1 is faster; ~ where the 20th to 80th percentiles overlap")
    for change in comparison.changes:
        mark = " " if change.clear else "~"
        where = f"{change.case}[{change.params}]"
        lines.append(f"{mark}{change.ratio:7.3f}  {change.before:11.4f} → {change.after:11.4f} ms  {where} {change.variant}")
    for title, names in (("only in the first file", comparison.only_before), ("only in the second file", comparison.only_after)):
        lines += [f"{title}: {name}" for name in names]
    return "\n".join(lines) or "the files have nothing in common"
