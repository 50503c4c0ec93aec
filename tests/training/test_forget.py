from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from der_fast.config.schema import Config
from der_fast.data import MemorySource
from der_fast.errors import DataError
from der_fast.training.learner import Learner

Tiny = Callable[..., Config]
Images = Callable[..., MemorySource]
SHORT = {"first.epochs": 1, "later.epochs": 1, "classifier.epochs": 1}


@pytest.fixture
def learner(tiny: Tiny, synthetic: Images) -> Learner:
    """Two steps of two classes."""
    learner = Learner(tiny(SHORT))
    learner.learn(synthetic("ab"), synthetic("ab", 2, seed=1))
    learner.learn(synthetic("cd"), synthetic("abcd", 2, seed=1))
    return learner


def logits(learner: Learner, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return learner.model.network.head(learner.model.network.bank(images))


def test_the_other_classes_stay_as_they_are(learner: Learner, synthetic: Images) -> None:
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    before, head = logits(learner, images), learner.model.network.head
    result = learner.forget("b", test=synthetic("acd", 2, seed=1))
    for left in (learner.model.network.head, learner.model.readout):
        assert torch.equal(left.weight, head.weight[[0, 2, 3]]) and torch.equal(left.bias, head.bias[[0, 2, 3]])
    # A product of another shape may be summed in another order.
    torch.testing.assert_close(logits(learner, images), before[:, [0, 2, 3]], rtol=0, atol=1e-5)
    assert learner.model.class_sets == [("a",), ("c", "d")]
    assert learner.model.memory.class_names == ("a", "c", "d")
    assert sorted(set(learner.model.memory.labels.tolist())) == [0, 1, 2]
    assert all(name != "b" for row in learner.predict(synthetic("abcd").images) for name, _ in row.top)
    metrics = learner.metrics()
    assert (metrics["class_names"], metrics["steps"]) == (["a", "c", "d"], [["a"], ["c", "d"]])
    assert (metrics["last_top1"], metrics["final_params"]) == (result.top1, learner.latest.params)
    assert metrics["final_params"] == metrics["params"][-1] - learner.model.network.bank.features - 1
    assert len(metrics["confusion"]) == 3
    assert [(event["kind"], event["class_names"]) for event in metrics["events"]] == [("forgotten", ["b"])]


def test_a_step_whose_classes_are_all_forgotten_keeps_its_extractor(learner: Learner, synthetic: Images, tmp_path: Path) -> None:
    learner.forget("a", "b")
    assert (len(learner.model.network.bank), learner.model.class_sets) == (2, [(), ("c", "d")])
    again = Learner.load(learner.save(tmp_path / "run"))
    images = synthetic("cd").images
    assert again.predict(images) == learner.predict(images)
    again.learn(synthetic("ef"), synthetic("cdef", 2, seed=1))
    assert again.model.class_sets == [(), ("c", "d"), ("e", "f")]
    metrics = again.metrics()
    assert metrics["class_set_top1"][-1][0] is None
    sets = [metrics["class_set_top1"][1][1], *metrics["class_set_top1"][2][1:]]
    # Of steps 2 and 3, as if they had been the only ones: only the first of their class sets has a past.
    assert metrics["bwt"] == pytest.approx((sets[1] - sets[0]) / 2)


def test_accuracy_is_unknown_until_it_is_measured(learner: Learner) -> None:
    learner.forget("d")
    metrics = learner.metrics()
    assert (metrics["last_top1"], metrics["confusion"]) == (None, None)
    assert metrics["top1"][-1] is not None


def test_a_forgotten_class_can_be_learned_again(learner: Learner, synthetic: Images) -> None:
    learner.forget("b")
    learner.learn(synthetic("b"), synthetic("abcd", 2, seed=1))
    assert learner.model.class_sets == [("a",), ("c", "d"), ("b",)]
    assert learner.evaluate(synthetic("abcd", 2, seed=1)).class_names == ("a", "c", "d", "b")


def test_notes_about_its_files_go_too(learner: Learner) -> None:
    learner.notes += ["skipped /photos/b/1.png: broken", "skipped C:\\photos\\b\\2.png: broken", "skipped /photos/c/3.png: broken"]
    learner.forget("b")
    assert learner.notes[-1] == "skipped /photos/c/3.png: broken"
    assert not any("photos/b" in note or "photos\\b" in note for note in learner.notes)


def test_without_a_memory(tiny: Tiny, synthetic: Images) -> None:
    learner = Learner(tiny({**SHORT, "memory.total": 0}))
    learner.learn(synthetic("ab"))
    learner.forget("a")
    assert (learner.class_names, learner.model.memory) == (("b",), None)
    assert [row.class_name for row in learner.predict(synthetic("ab").images)] == ["b"] * 10


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ((), "name at least one class"),
        (("x", "a"), "there is no class 'x'; the known ones are 'a', 'b', 'c', 'd'"),
        (("d", "c", "b", "a"), "cannot be forgotten, because a model needs at least one; delete the run's folder"),
    ],
)
def test_what_cannot_be_forgotten(names: tuple[str, ...], words: str, learner: Learner) -> None:
    before = learner.metrics()
    with pytest.raises(DataError, match=words):
        learner.forget(*names)
    assert learner.metrics() == before


def test_a_name_given_twice_counts_once(learner: Learner) -> None:
    learner.forget("a", "a")
    assert learner.events[-1].class_names == ("a",)
