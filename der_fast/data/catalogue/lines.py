"""The lines of a text list: a path and a class, both of which may contain spaces.

    cat/1.jpg cat                   white space or a comma between the two, if only one place is possible
    my photos/a 1.jpg big dog       the path ends with an image's suffix
    my photos/a 1<TAB>big dog       a tab, or quotes, leave no doubt
    "my photos/a, 1.jpg","big dog"

If the suffix does not decide, the possible paths are looked up on the drive; a line that is still unclear is refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from der_fast.data.catalogue.kinds import is_image_name, unread_kind
from der_fast.data.io.names import spelled
from der_fast.data.io.threads import Some, mapped, some
from der_fast.errors import DataError

_BETWEEN = re.compile(r"\s*,\s*|\s+")
_QUOTED_FRONT = re.compile(r'"((?:[^"]|"")+)"(?:\s*,\s*|\s+)(.+)')
_QUOTED_BACK = re.compile(r'(.+?)(?:\s*,\s*|\s+)"((?:[^"]|"")+)"')
_HEADER = (("path", "file", "filename", "file_name", "image", "image_path", "img"), ("class", "label", "category", "class_name", "target"))
_ASKED_AT_ONCE = 64


@dataclass(frozen=True)
class Line:
    """One line of a list.

    Args:
        number: the line's number, from 1.
        path: as written.
        class_name: composed (see `spelled`).
    """

    number: int
    path: str
    class_name: str


def parse_lines(place: Path, lines: Sequence[str], timeout: float) -> list[Line]:
    """Split every line that is not empty into path and class.

    Args:
        place: the list; paths are relative to its folder.
        lines: its lines.
        timeout: seconds to wait for a drive if paths are looked up.

    Raises:
        DataError: a line that is not 'path class' or leaves unclear where the class begins; an image with two classes; a drive that does
            not answer.
    """
    readings = [(number, _readings(line.strip())) for number, line in enumerate(lines, 1) if line.strip()]
    if readings and _is_header(readings[0][1]):
        readings = readings[1:]
    for number, found in readings:
        if not found:
            raise DataError(f"{place}, line {number}: {lines[number - 1]!r} is not 'path class'; write the class after the path")
    unclear = {number: found for number, found in readings if len(found) > 1}
    settled = {number: found[0] for number, found in readings if len(found) == 1}
    settled.update(_asked(place, lines, unclear, timeout))
    rows = [Line(number, settled[number][0], spelled(settled[number][1])) for number, _ in readings]
    return _without_repeats(place, rows)


def _readings(line: str) -> list[tuple[str, str]]:
    """Return every reading of a line as (path, class): just one if it is clear."""
    if "\t" in line:
        parts = [_unquoted(part.strip()) for part in line.split("\t") if part.strip()]
        return [(parts[0], parts[1])] if len(parts) == 2 else []
    for form in (_QUOTED_FRONT, _QUOTED_BACK):
        if (quoted := form.fullmatch(line)) is not None:
            front, back = quoted.groups()
            return [
                (_unquoted(f'"{front}"' if form is _QUOTED_FRONT else front), _unquoted(back if form is _QUOTED_FRONT else f'"{back}"'))
            ]
    found = [(line[: match.start()], line[match.end() :]) for match in _BETWEEN.finditer(line)]
    found = [(path, name) for path, name in found if path and name]
    named = [pair for pair in found if is_image_name(pair[0]) or unread_kind(pair[0]) is not None]
    return named if len(named) == 1 else found


def _unquoted(text: str) -> str:
    return text[1:-1].replace('""', '"') if len(text) > 2 and text[0] == text[-1] == '"' else text


def _is_header(found: Sequence[tuple[str, str]]) -> bool:
    return len(found) == 1 and all(word.lower() in words for word, words in zip(found[0], _HEADER, strict=True))


def _asked(place: Path, lines: Sequence[str], unclear: dict[int, list[tuple[str, str]]], timeout: float) -> dict[int, tuple[str, str]]:
    """Resolve lines by looking which of their possible paths are files."""
    pairs = [(number, pair) for number, found in unclear.items() for pair in found]
    groups = some([os.path.join(place.parent, path) for _, (path, _) in pairs], _ASKED_AT_ONCE)  # noqa: PTH118
    there = [answer for answers in mapped(_are_files, groups, timeout) for answer in answers]
    files: dict[int, list[tuple[str, str]]] = {}
    for (number, pair), is_file in zip(pairs, there, strict=True):
        if is_file:
            files.setdefault(number, []).append(pair)
    for number, found in unclear.items():
        paths = [path for path, _ in files.get(number, [])]
        if len(paths) != 1:
            which = (
                f"{' and '.join(map(repr, paths))} are files"
                if paths
                else f"none of {', '.join(repr(path) for path, _ in found[:5])} is a file"
            )
            raise DataError(
                f"{place}, line {number}: {lines[number - 1].strip()!r} does not show where the path ends and the class begins ({which}); "
                "put a tab between the two"
            )
    return {number: found[0] for number, found in files.items()}


def _are_files(group: Some) -> list[bool]:
    return [os.path.isfile(path) for path in group.paths]  # noqa: PTH113


def _without_repeats(place: Path, rows: Sequence[Line]) -> list[Line]:
    """Keep the first of equal lines; refuse an image with two classes."""
    first: dict[str, Line] = {}
    for row in rows:
        before = first.setdefault(os.path.normpath(row.path), row)
        if before.class_name != row.class_name:
            raise DataError(
                f"{place}, lines {before.number} and {row.number}: {row.path!r} is listed as {before.class_name!r} and as "
                f"{row.class_name!r}; leave one of them out"
            )
    return list(first.values())
