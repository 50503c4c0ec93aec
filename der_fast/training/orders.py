"""Class orders of the field: published ones by name, and those of a seed. All index the class names in alphabetical order.

"icarl", "podnet-2" and "podnet-3" are the three orders of CIFAR-100 that the DER paper (Yan, Xie, He, CVPR 2021) averages over. They are
PODNet's (Douillard et al., ECCV 2020), taken from its authors' code. The first one is iCaRL's (Rebuffi et al., CVPR 2017) and follows from
its authors' code; the others follow no known rule. "numpy-1993" is the order of seed 1993, which UCIR and PyCIL use for CIFAR-100, and
PODNet and DER for ImageNet.

NumPy's `RandomState` is frozen (NEP 19): a seed gives the same order with every version.
"""

from __future__ import annotations

import numpy as np
import torch

from der_fast.config.rules import IMAGENET_ORDER
from der_fast.errors import ConfigError
from der_fast.seeds import generator

_PODNET = {
    "podnet-2": """
        58 30 93 69 21 77 3 78 12 71 65 40 16 49 89 46 24 66 19 41 5 29 15 73 11 70 90 63 67 25 59 72 80 94 54 33 18 96 2 10 43
        9 57 81 76 50 32 6 37 7 68 91 88 95 85 4 60 36 22 27 39 42 34 51 55 28 53 48 38 17 83 86 56 35 45 79 99 84 97 82 98 26
        47 44 62 13 31 0 75 14 52 74 8 20 1 92 87 23 64 61""",
    "podnet-3": """
        71 54 45 32 4 8 48 66 1 91 28 82 29 22 80 27 86 23 37 47 55 9 14 68 25 96 36 90 58 21 57 81 12 26 16 89 79 49 31 38 46
        20 92 88 40 39 98 94 19 95 72 24 64 18 60 50 63 61 83 76 69 35 0 52 7 65 42 73 74 30 41 3 6 53 13 56 70 77 34 97 75 2 17
        93 33 84 99 51 62 87 5 15 10 78 67 44 59 85 43 11""",
}


def seeded_order(seed: int, count: int) -> list[int]:
    """Return the order of a seed by the field's convention: ``RandomState(seed).permutation(count)``.

    Args:
        seed: from 0 to 2³² − 1.
        count: number of classes.
    """
    order: list[int] = np.random.RandomState(seed).permutation(count).tolist()
    return order


def named_order(name: str, count: int) -> list[int]:
    """Return the order with the given name.

    Args:
        name: one of `der_fast.config.rules.ORDERS`, or ``"torch-<seed>"``: what a seed meant up to version 0.1.0.
        count: number of classes.

    Raises:
        ConfigError: an order of 100 classes for another number of classes.
    """
    if name.startswith("torch-"):
        shuffled: list[int] = torch.randperm(count, generator=generator(int(name.removeprefix("torch-")), "class order")).tolist()
        return shuffled
    if name == IMAGENET_ORDER:
        return seeded_order(1993, count)
    order = _icarl() if name == "icarl" else [int(index) for index in _PODNET[name].split()]
    if len(order) != count:
        raise ConfigError(
            f"protocol.class_order={name!r} is an order of {len(order)} classes, but there are {count}; "
            "set protocol.class_order_seed instead, or list the class names"
        )
    return order


def _icarl() -> list[int]:
    random = np.random.RandomState(1993)
    # The authors' code shuffles the images of every class first.
    for _ in range(100):
        random.shuffle(np.arange(500))
    order = np.arange(100)
    random.shuffle(order)
    indices: list[int] = order.tolist()
    return indices
