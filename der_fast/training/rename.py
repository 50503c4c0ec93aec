"""Renaming a class; no weight changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from der_fast.data.source import renamed
from der_fast.errors import DataError
from der_fast.training.model import Model

_MOST_NAMED = 10


def check_known(names: Sequence[str], known: Sequence[str]) -> None:
    """Refuse names of unknown classes; raises DataError with those names and the known ones."""
    unknown = [name for name in names if name not in known]
    if unknown:
        more = f" and {len(known) - _MOST_NAMED} more" if len(known) > _MOST_NAMED else ""
        raise DataError(
            f"there is no class {', '.join(map(repr, unknown))}; the known ones are {', '.join(map(repr, known[:_MOST_NAMED]))}{more}"
        )


def renamed_model(model: Model, old: str, new: str) -> Model:
    """Return the model with the class `old` called `new`; the given one is left unchanged.

    Raises:
        DataError: there is no class `old`, or the new name is empty or taken.
    """
    check_known([old], model.class_names)
    if not isinstance(new, str) or not new.strip():
        raise DataError(f"the name of a class must be a text that is not empty, not {new!r}")
    if new == old:
        raise DataError(f"class {old!r} already has that name")
    if new in model.class_names:
        raise DataError(f"there is already a class {new!r}; give a name that no class has, or rename or forget that class first")
    memory = model.memory if model.memory is None else renamed(model.memory, {old: new})
    sets = [tuple(new if name == old else name for name in names) for names in model.class_sets]
    return replace(model, memory=memory, class_sets=sets)
