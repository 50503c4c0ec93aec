from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from der_fast.config.schema import Config
from der_fast.data import MemorySource
from der_fast.errors import DataError, DerFastError
from der_fast.training.learner import Learner

Tiny = Callable[..., Config]
Images = Callable[..., MemorySource]
SHORT = {"first.epochs": 1, "later.epochs": 1, "classifier.epochs": 1}


@pytest.fixture(scope="module")
def learner(tiny: Tiny, synthetic: Images) -> Learner:
    learner = Learner(tiny(SHORT))
    learner.learn(synthetic("ab"))
    learner.learn(synthetic("cd"), synthetic("abcd", 2, seed=1))
    return learner


def test_a_new_name_is_used_everywhere_and_no_weight_changes(tiny: Tiny, synthetic: Images, watcher: Any) -> None:
    learner = Learner(tiny(SHORT))
    learner.learn(synthetic("ab"))
    learner.learn(synthetic("cd"), synthetic("abcd", 2, seed=1))
    images = synthetic("abcd").images
    head, before = learner.model.network.head.weight.clone(), learner.predict(images)
    learner.rename("b", "bee")
    assert learner.class_names == ("a", "bee", "c", "d")
    assert torch.equal(learner.model.network.head.weight, head)
    assert learner.model.memory.class_names == learner.class_names
    assert learner.metrics()["class_names"] == ["a", "bee", "c", "d"]
    assert learner.metrics()["steps"] == [["a", "bee"], ["c", "d"]]
    for row, old in zip(learner.predict(images), before, strict=True):
        assert [("b" if name == "bee" else name, share) for name, share in row.top] == list(old.top)
    learner.observer = watcher
    learner.learn(synthetic("be"))
    assert learner.class_names == ("a", "bee", "c", "d", "b", "e")
    assert any(
        "as new classes, although known ones had these names before they were renamed: 'b' ('bee' now); if" in text
        for text in watcher.messages
    )


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("x", "y", "there is no class 'x'; the known ones are 'a', 'b', 'c', 'd'"),
        ("a", "c", "there is already a class 'c'"),
        ("a", "a", "already has that name"),
        ("a", " ", "a text that is not empty"),
        ("a", 7, "a text that is not empty, not 7"),
    ],
)
def test_names_that_are_refused(old: str, new: Any, words: str, learner: Learner) -> None:
    before = learner.metrics()
    with pytest.raises(DataError, match=words):
        learner.rename(old, new)
    assert learner.metrics() == before


def test_a_learner_that_knows_nothing(tiny: Tiny) -> None:
    for call in (lambda learner: learner.rename("a", "b"), lambda learner: learner.forget("a")):
        with pytest.raises(DerFastError, match="nothing has been learned yet"):
            call(Learner(tiny()))
