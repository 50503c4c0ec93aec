"""Published class orders are those of the field, to the last class."""

from __future__ import annotations

import hashlib

import pytest

from der_fast.config.rules import CIFAR_ORDERS, ORDERS
from der_fast.config.schema import ProtocolConfig
from der_fast.errors import ConfigError
from der_fast.training.orders import named_order, seeded_order
from der_fast.training.protocol import class_order


@pytest.mark.parametrize(
    ("name", "starts", "ends", "digest"),
    [
        ("icarl", [87, 0, 52, 58, 44], [26, 35, 39], "3c06ac62f0fa031e"),
        ("podnet-2", [58, 30, 93, 69, 21], [23, 64, 61], "a0b20d5b7b45c113"),
        ("podnet-3", [71, 54, 45, 32, 4], [85, 43, 11], "6aba3190865415ab"),
        ("numpy-1993", [68, 56, 78, 8, 23], [49, 57, 33], "835a3cb766d249ae"),
    ],
)
def test_the_orders_of_100_classes(name: str, starts: list[int], ends: list[int], digest: str) -> None:
    order = named_order(name, 100)
    assert (order[:5], order[-3:]) == (starts, ends)
    assert sorted(order) == list(range(100))
    assert hashlib.sha256(bytes(order)).hexdigest()[:16] == digest


def test_every_name_is_an_order() -> None:
    assert len({tuple(named_order(name, 100)) for name in ORDERS}) == len(ORDERS)


def test_seed_1993() -> None:
    assert named_order("numpy-1993", 1000)[:4] == [54, 7, 894, 512]
    assert seeded_order(1993, 100) == named_order("numpy-1993", 100)


@pytest.mark.parametrize("name", CIFAR_ORDERS)
@pytest.mark.parametrize("count", [10, 99, 101])
def test_an_order_of_100_classes_needs_as_many(name: str, count: int) -> None:
    names = [f"class{index:03d}" for index in range(count)]
    with pytest.raises(ConfigError, match=f"protocol.class_order='{name}' is an order of 100 classes, but there are {count}; set"):
        class_order(names, ProtocolConfig(class_order=name))


def test_indices_count_in_the_alphabetical_names() -> None:
    names = [f"class{index:03d}" for index in range(100)]
    for listed in (names, names[::-1]):
        assert class_order(listed, ProtocolConfig(class_order="icarl"))[:3] == ("class087", "class000", "class052")


def test_what_a_seed_meant_before() -> None:
    assert named_order("torch-1993", 10) == [1, 6, 2, 9, 8, 3, 7, 0, 5, 4]
