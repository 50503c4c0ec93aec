from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from der_fast.config.schema import ProtocolConfig
from der_fast.errors import ConfigError
from der_fast.training.orders import seeded_order
from der_fast.training.protocol import class_order, split_steps, steps_of

NAMES = tuple(f"class{index}" for index in range(12))


@given(base=st.integers(0, 30), steps=st.integers(1, 12), size=st.integers(1, 6))
def test_every_class_arrives_once_in_order(base: int, steps: int, size: int) -> None:
    order = tuple(f"c{index}" for index in range(base + steps * size))
    parts = split_steps(order, f"B{base}-{steps}")
    assert tuple(name for part in parts for name in part) == order
    assert [len(part) for part in parts] == ([base] if base else []) + [size] * steps


@given(classes=st.integers(0, 30), base=st.integers(0, 40), steps=st.integers(0, 40))
def test_what_does_not_divide_is_refused(classes: int, base: int, steps: int) -> None:
    rest = classes - base
    divides = steps > 0 and rest >= steps and rest % steps == 0
    order = [f"c{index}" for index in range(classes)]
    if divides:
        assert len(split_steps(order, f"B{base}-{steps}")) == steps + (base > 0)
    else:
        with pytest.raises(ConfigError, match=f"B{base}-{steps}"):
            split_steps(order, f"B{base}-{steps}")


@pytest.mark.parametrize(
    ("protocol", "classes", "sizes"),
    [
        ("B0-5", 100, [20] * 5),
        ("B0-10", 100, [10] * 10),
        ("B0-50", 100, [2] * 50),
        ("B50-2", 100, [50, 25, 25]),
        ("B50-10", 100, [50] + [5] * 10),
        ("b0-1", 2, [2]),
        (" B1-1 ", 2, [1, 1]),
    ],
)
def test_the_papers_protocols(protocol: str, classes: int, sizes: list[int]) -> None:
    assert [len(part) for part in split_steps([str(index) for index in range(classes)], protocol)] == sizes


@pytest.mark.parametrize("text", ["", "B0", "0-5", "B0-", "B-5", "B0-5-2", "B0_5", "B0.5-2", "C0-5", "B0--5", "B0-5 classes"])
def test_a_text_that_is_no_protocol(text: str) -> None:
    with pytest.raises(ConfigError, match="not of the form"):
        split_steps(NAMES, text)


def test_the_message_names_what_would_fit() -> None:
    with pytest.raises(ConfigError, match="10 classes after the first 2 can be divided into 1, 2, 5, 10 steps"):
        split_steps(NAMES, "B2-3")
    with pytest.raises(ConfigError, match="smaller base"):
        split_steps(NAMES, "B12-1")


@given(st.permutations(NAMES), st.integers(0, 2**32 - 1))
def test_a_seed_permutes_the_alphabetical_names_however_they_are_listed(names: list[str], seed: int) -> None:
    order = class_order(names, ProtocolConfig(class_order_seed=seed))
    alphabetical = sorted(NAMES)
    assert order == tuple(alphabetical[index] for index in np.random.RandomState(seed).permutation(len(NAMES)))
    assert sorted(order) == alphabetical


def test_another_seed_is_another_order() -> None:
    assert class_order(NAMES, ProtocolConfig(class_order_seed=1993)) != class_order(NAMES, ProtocolConfig(class_order_seed=1994))


def test_names_are_sorted_as_people_read_them() -> None:
    # Decomposed, "café" would come before "cafz".
    for written in ("caf\u00e9", "cafe\u0301"):
        order = class_order(("tea", "cafz", written), ProtocolConfig(class_order="numpy-1993"))
        assert order == tuple(("cafz", written, "tea")[index] for index in seeded_order(1993, 3))


def test_without_a_seed_the_data_sets_own_order() -> None:
    assert class_order(NAMES, ProtocolConfig(class_order_seed=None)) == NAMES


@given(st.permutations(NAMES))
def test_an_explicit_order_wins_over_the_seed(order: list[str]) -> None:
    assert class_order(NAMES, ProtocolConfig(class_order=tuple(order), class_order_seed=3)) == tuple(order)


@pytest.mark.parametrize(
    ("order", "words"),
    [
        (("class1", "class2", "class1"), "'class1' more than once"),
        (("class1", "dog", "cat"), "dog, cat, which the data set does not have; its classes: class0, class1"),
    ],
)
def test_an_order_that_does_not_fit(order: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        class_order(NAMES, ProtocolConfig(class_order=order))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9))
def test_sizes_deal_out_every_class_in_order(sizes: list[int]) -> None:
    order = tuple(f"c{index}" for index in range(sum(sizes)))
    parts = split_steps(order, ",".join(map(str, sizes)))
    assert tuple(name for part in parts for name in part) == order
    assert [len(part) for part in parts] == sizes


@pytest.mark.parametrize(
    ("protocol", "words"),
    [
        ("5,5,1", "has 11 classes in total, but there are 12"),
        ("10,5", "has 15 classes in total, but there are 12"),
        ("3", "has 3 classes in total, but there are 12; for 3 equal steps write B0-3"),
        ("6,0,6", "step 2 has no class"),
    ],
)
def test_sizes_that_do_not_add_up(protocol: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        split_steps(NAMES, protocol)


def test_steps_that_are_named() -> None:
    steps = (("class7", "class1"), ("class3",))
    assert steps_of(NAMES, ProtocolConfig(steps=steps)) == list(steps)
    assert steps_of(NAMES, ProtocolConfig("5,7", class_order_seed=None)) == [NAMES[:5], NAMES[5:]]
    for wrong, words in (
        (("dog",), "step 2 of protocol.steps names dog, which"),
        ((), "step 2 .* has no class"),
        (("class1",), "'class1' more"),
    ):
        with pytest.raises(ConfigError, match=words):
            steps_of(NAMES, ProtocolConfig(steps=(("class1",), wrong)))


def test_an_order_names_classes_as_people_read_them() -> None:
    names = ("caf\u00e9", "tea")
    assert class_order(names, ProtocolConfig(class_order=("tea", "cafe\u0301"))) == ("tea", "caf\u00e9")
