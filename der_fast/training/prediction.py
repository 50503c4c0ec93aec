"""From probabilities to class names."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from der_fast.config.tree import plain
from der_fast.errors import ConfigError, Spelling


@dataclass(frozen=True)
class Prediction:
    """The model's answer for one image: the best class, its probability in [0, 1], and the best few as (name, probability)."""

    class_name: str
    probability: float
    top: tuple[tuple[str, float], ...]


def check_top(top: Any) -> int:
    """Return `top`, an integer of any type, as an int; raises ConfigError if it is not an integer, or below 1."""
    try:
        number = operator.index(plain(top))
    except TypeError:
        number = 0
    if number < 1 or isinstance(plain(top), bool):
        raise ConfigError(Spelling("--top", "top"), f" takes a whole number of at least 1, not {top!r}")
    return number


def predictions_of(probabilities: Tensor, class_names: Sequence[str], top: int) -> list[Prediction]:
    """Return the `top` best classes of every row.

    Args:
        probabilities: (N, C), in [0, 1].
        class_names: C names.
        top: maximum number of classes per row, at least 1.
    """
    values, indices = probabilities.topk(min(top, len(class_names)), 1)
    rows = [
        tuple((class_names[i], float(p)) for i, p in zip(row.tolist(), best.tolist(), strict=True))
        for row, best in zip(indices, values, strict=True)
    ]
    return [Prediction(row[0][0], row[0][1], row) for row in rows]
