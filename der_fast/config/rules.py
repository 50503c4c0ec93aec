"""What a configuration key takes: in words, and as a test."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

LARGEST_SEED = 2**63 - 1
# They are defined in der_fast/training/orders.py.
CIFAR_ORDERS = ("icarl", "podnet-2", "podnet-3")
IMAGENET_ORDER = "numpy-1993"
ORDERS = (*CIFAR_ORDERS, IMAGENET_ORDER)


@dataclass(frozen=True)
class Rule:
    """The values that a key takes: in words, and as a test of a value that already has the key's type."""

    takes: str
    accepts: Callable[[Any], bool]


def at_least(low: float, what: str = "a whole number") -> Rule:
    return Rule(f"{what} of at least {low}", lambda value: low <= value < math.inf)


def between(low: float, high: float, what: str = "a number") -> Rule:
    return Rule(f"{what} from {low} to {high}", lambda value: low <= value <= high)


def count(low: int, high: int) -> Rule:
    return between(low, high, "a whole number")


def one_of(choices: Collection[str]) -> Rule:
    return Rule(f"one of {', '.join(choices)}", lambda value: value in choices)


def channels(rule: Rule) -> Rule:
    return Rule(f"three values, each {rule.takes}", lambda values: all(rule.accepts(value) for value in values))


def _is_increasing(values: tuple[int, ...]) -> bool:
    return all(value >= 1 for value in values) and all(a < b for a, b in itertools.pairwise(values))


def _are_names(names: tuple[str, ...]) -> bool:
    return bool(names) and all(names)


SWITCH = Rule("true or false", lambda value: True)
TEXT = Rule("a text that is not empty", lambda value: bool(value.strip()))
SEED = Rule("a whole number from 0 to 2⁶³ − 1", lambda value: 0 <= value <= LARGEST_SEED)
DEVICE = Rule("cpu, cuda, cuda:<number> or auto", lambda value: re.fullmatch(r"auto|cpu|cuda(:\d+)?", value) is not None)

POSITIVE = Rule("a number above 0", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = at_least(0, "a number")
ABOVE_ONE = Rule("a number above 1", lambda value: 1 < value < math.inf)
FACTOR = Rule("a number above 0, at most 1", lambda value: 0 < value <= 1)
BELOW_ONE = Rule("a number of at least 0, below 1", lambda value: 0 <= value < 1)
INSIDE = Rule("a number above 0 and below 1", lambda value: 0 < value < 1)
SHARE = Rule("a share above 0, at most 1", lambda value: 0 < value <= 1)
SHARE_BELOW_ONE = Rule("a share of at least 0, below 1", lambda value: 0 <= value < 1)

EPOCHS = Rule("epochs in increasing order, the first at least 1", _is_increasing)
CLASSES = Rule("one or more class names, none of them repeated", lambda names: 0 < len(names) == len(set(names)) and all(names))
STEPS = Rule("one or more lists of class names, none of them empty", lambda steps: bool(steps) and all(map(_are_names, steps)))
# Repeated names are refused by name: a list of a hundred classes would not show which one it is.
ORDER = Rule(
    f"{', '.join(ORDERS)}, torch-<seed>, or two or more class names, none of them repeated",
    lambda order: (
        order in ORDERS or re.fullmatch(r"torch-\d+", order) is not None if isinstance(order, str) else len(order) > 1 and all(order)
    ),
)
# NumPy's generator does not take a larger one.
ORDER_SEED = count(0, 2**32 - 1)
