"""The same images under other class names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from der_fast.data.photos import PhotoSource
from der_fast.data.selection import check_names
from der_fast.data.source import ImageSource, MemorySource
from der_fast.errors import DataError


def renamed(source: ImageSource, names: Mapping[str, str]) -> ImageSource:
    """Return a source whose classes are called by `names` (old → new); classes that are not in there keep theirs.

    Raises:
        DataError: two classes would have the same name, or a source of a kind that cannot be renamed.
    """
    wanted = tuple(names.get(name, name) for name in source.class_names)
    if wanted == source.class_names:
        return source
    check_names(wanted)
    if isinstance(source, PhotoSource):
        return replace(source, class_names=wanted)
    if isinstance(source, MemorySource):
        return source.called(wanted)
    raise DataError(f"the classes of a {type(source).__name__} cannot be renamed; give images under the names that the run has now")
