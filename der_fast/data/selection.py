"""Choosing images by number and class name; every error names what is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from der_fast.data.io.names import spelled
from der_fast.errors import DataError


def check_indices(indices: Tensor, count: int) -> Tensor:
    """Return positions in a source of `count` images as int64 on the CPU; raises DataError if one is out of range."""
    if indices.dim() != 1 or indices.is_floating_point() or indices.dtype == torch.bool:
        raise DataError(f"indices must be a one-dimensional tensor of integers, not {indices.dtype}, {tuple(indices.shape)}")
    indices = indices.to("cpu", torch.int64)
    wrong = ((indices < 0) | (indices >= count)).nonzero().flatten()
    if len(wrong):
        raise DataError(f"index {int(indices[wrong[0]])} is out of range: there are {count} images, numbered from 0")
    return indices


def selection_of(labels: Tensor, class_names: Sequence[str], names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return the positions of the images of some classes, and their labels into `names`.

    Raises:
        DataError: an unknown or repeated name, or a class without images.
    """
    check_names(names)
    known = {spelled(name): number for number, name in enumerate(class_names)}
    unknown = [name for name in names if spelled(name) not in known]
    if unknown:
        raise DataError(f"unknown class {', '.join(map(repr, unknown))}; there are {few(class_names)}")
    position = torch.full((len(class_names),), -1, dtype=torch.int64)
    for label, name in enumerate(names):
        position[known[spelled(name)]] = label
    found = position[labels]
    chosen = (found >= 0).nonzero().flatten()
    counts = torch.bincount(found[chosen], minlength=len(names))
    empty = [name for name, count in zip(names, counts.tolist(), strict=True) if count == 0]
    if empty:
        raise DataError(f"no images of class {', '.join(map(repr, empty))}; add images or leave the class out")
    return chosen, found[chosen]


def positions_of(names: Sequence[str], class_names: Sequence[str]) -> Tensor:
    """Return the position of every name of a source in `class_names`, (C,) int64; raises DataError if one is missing."""
    check_names(class_names)
    place = {spelled(name): number for number, name in enumerate(class_names)}
    missing = [name for name in names if spelled(name) not in place]
    if missing:
        raise DataError(f"cannot relabel: class {', '.join(map(repr, missing))} is not among the new class names")
    return torch.tensor([place[spelled(name)] for name in names], dtype=torch.int64)


def few(names: Sequence[str], most: int = 10) -> str:
    """List names for a message, only the first few."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def check_names(names: Sequence[str]) -> None:
    """Refuse repeated class names, however they are spelled; raises DataError."""
    repeated = sorted(name for name, count in Counter(map(spelled, names)).items() if count > 1)
    if repeated:
        raise DataError(f"class name {', '.join(map(repr, repeated))} appears more than once; class names must be distinct")
