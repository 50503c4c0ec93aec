"""What a data set holds but is not learned, in sentences: nothing found next to the images is dropped silently."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from der_fast.data.catalogue.kinds import REMEDIES

_MOST_CLASSES = 20


def left_out(counts: Mapping[str, Mapping[str, int]]) -> str | None:
    """Say which files are left out; None if there are none.

    Args:
        counts: class name → kind → number of files.
    """
    kinds: dict[str, dict[str, int]] = {}
    for name, found in counts.items():
        for kind, count in found.items():
            kinds.setdefault(kind, {})[name] = count
    if not kinds:
        return None
    total = sum(sum(classes.values()) for classes in kinds.values())
    rows = sorted(kinds.items(), key=lambda row: (-sum(row[1].values()), row[0]))
    return f"left out: {counted(total, 'file')} that cannot be read as images: {'; '.join(_of_kind(*row) for row in rows)}"


def _of_kind(kind: str, classes: Mapping[str, int]) -> str:
    names = sorted(classes, key=lambda name: (-classes[name], name))
    named = [f"{name or 'without a class'} {classes[name]:,}" for name in names[:_MOST_CLASSES]]
    more = [f"{len(names) - _MOST_CLASSES} more classes {sum(classes[name] for name in names[_MOST_CLASSES:]):,}"]
    where = ", ".join(named + (more if len(names) > _MOST_CLASSES else []))
    remedy = f", {REMEDIES[kind]}" if kind in REMEDIES else ""
    return f"{sum(classes.values()):,} {kind}{f' ({where})' if any(classes) else ''}{remedy}"


def what_is_left(found: Mapping[str, int]) -> str:
    """Name the files of one folder that are left out, for a message: ' (it holds 6 HEIC, …)'; '' if there are none."""
    if not found:
        return ""
    return f" (it holds {', '.join(_of_kind(kind, {'': count}) for kind, count in sorted(found.items()))})"


def added(*counts: Mapping[str, int]) -> Counter[str]:
    """Return the sum of several counts."""
    return sum(map(Counter, counts), Counter())


def below_notes(names: Sequence[str], below: Mapping[str, int], totals: Mapping[str, int]) -> list[str]:
    """Say which images are deeper than in their class folders.

    Args:
        names: the classes.
        below: class name → images in folders below the class folder.
        totals: class name → all its images.
    """
    count = sum(below.values())
    if not count:
        return []
    if len(names) == 1 and below.get(names[0], 0) == totals[names[0]]:
        return [
            f"all images are in folders below {names[0]!r}, which is taken for one class; if these folders are the classes, give "
            f"{names[0]} itself as the data set"
        ]
    some = sum(1 for name in names if below.get(name))
    return [f"{counted(count, 'image')} of {some} class(es) are in folders below the class folder and count as its own"]


def counted(count: int, what: str) -> str:
    """Return '1 file', '2 files'."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"
