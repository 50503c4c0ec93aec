"""More images of known classes: what changes, what stays, what is refused, and that a killed refresh goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from der_fast.config.schema import Config
from der_fast.data import MemorySource
from der_fast.errors import ConfigError, DataError
from der_fast.training.learner import Learner
from der_fast.training.progress import EpochRecord, Observer
from der_fast.training.run import learn_more, run_protocol
from der_fast.training.storage.named_files import load_manifest, save_manifest

Tiny = Callable[..., Config]
Images = Callable[..., MemorySource]
SHORT = {"protocol.name": "B0-2", "first.epochs": 1, "later.epochs": 1, "classifier.epochs": 2}


@pytest.fixture(scope="module")
def finished(tiny: Tiny, synthetic: Images, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps of two classes, three exemplars each."""
    out = tmp_path_factory.mktemp("run") / "run"
    run_protocol(tiny(SHORT), synthetic("abcd"), synthetic("abcd", 2, seed=1), out)
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def weights(learner: Learner) -> list[torch.Tensor]:
    return [extractor.arena.storage for extractor in learner.model.network.bank.extractors]


def pictures(source: MemorySource, name: str) -> set[bytes]:
    part = source.images[source.labels == source.class_names.index(name)]
    return {image.numpy().tobytes() for image in part}


def test_a_refresh_adds_no_extractor_and_changes_none(run: Path, tiny: Tiny, synthetic: Images, watcher: Any) -> None:
    before = Learner.load(run)
    fresh, test = synthetic("bd", 6, seed=5), synthetic("abcd", 2, seed=1)
    learner = learn_more(run, fresh, test, tiny(SHORT), observer=watcher)
    assert learner.class_names == tuple("abcd")
    assert all(torch.equal(one, other) for one, other in zip(weights(before), weights(learner), strict=True))
    assert not torch.equal(before.model.network.head.weight, learner.model.network.head.weight)
    assert any("already known: 'b', 'd'; they refresh rehearsal memory and classifier; extractors" in text for text in watcher.messages)
    assert {(record.step, record.stage) for record in watcher.records} == {(2, "classifier")}
    assert watcher.summaries[-1]["refreshed"] is True
    # What was saved is what the learner is.
    again = Learner.load(run)
    images = synthetic("abcd", 3, seed=8).images
    assert again.predict(images) == learner.predict(images)
    assert (again.events, again.lesson) == (learner.events, fresh.fingerprint())
    assert not list(run.glob("checkpoints/*"))


def test_the_memory_is_chosen_again_among_old_and_new_images(run: Path, tiny: Tiny, synthetic: Images) -> None:
    memory = Learner.load(run).model.memory
    assert isinstance(memory, MemorySource)
    fresh = synthetic("bd", 6, seed=5)
    after = learn_more(run, fresh, None, tiny(SHORT)).model.memory
    assert isinstance(after, MemorySource)
    assert torch.bincount(after.labels).tolist() == [3] * 4
    for name in "ac":
        assert pictures(after, name) == pictures(memory, name)
    for name in "bd":
        assert pictures(after, name) <= pictures(memory, name) | pictures(fresh, name)
        assert pictures(after, name) & pictures(fresh, name)


def test_a_class_that_was_scarce_gets_its_quota(tiny: Tiny, synthetic: Images) -> None:
    learner = Learner(tiny(SHORT))
    learner.learn(synthetic("ab").subset(torch.tensor([0, 1, 2, 3, 4, 5])))
    assert torch.bincount(learner.model.memory.labels).tolist() == [5, 1]
    learner.learn(synthetic("b", 8, seed=3))
    assert torch.bincount(learner.model.memory.labels).tolist() == [5, 6]


def test_metrics_say_that_it_was_refreshed(run: Path, tiny: Tiny, synthetic: Images) -> None:
    steps = json.loads((run / "metrics.json").read_text())
    learn_more(run, synthetic("bd", 6, seed=5), synthetic("abcd", 2, seed=1), tiny(SHORT))
    metrics = json.loads((run / "metrics.json").read_text())
    (event,) = metrics["events"]
    assert (event["kind"], event["step"], event["class_names"], event["images"], event["params_added"]) == (
        "refreshed",
        2,
        ["b", "d"],
        12,
        0,
    )
    assert (metrics["last_top1"], metrics["final_params"]) == (event["top1"], event["params"]) == (event["top1"], steps["final_params"])
    for name in ("steps", "top1", "params", "bwt", "average_top1"):
        assert metrics[name] == steps[name]
    assert sum(map(sum, metrics["confusion"])) == 8


def test_images_that_the_memory_holds_are_not_learned_twice(run: Path, tiny: Tiny, synthetic: Images, watcher: Any) -> None:
    memory = Learner.load(run).model.memory
    assert isinstance(memory, MemorySource)
    with pytest.raises(DataError, match="all 3 images are already in the rehearsal memory"):
        learn_more(run, memory.of_classes("b"), None, tiny(SHORT))
    mixed = memory.of_classes("b").concatenated(synthetic("b", 4, seed=6))
    learner = learn_more(run, mixed, None, tiny(SHORT), observer=watcher)
    assert learner.events[0].images == 4
    assert any("(3 image(s) were already in the memory)" in text for text in watcher.messages)
    with pytest.raises(DataError, match="'b' is already known, and these are exactly the images that were learned last"):
        learn_more(run, mixed, None, tiny(SHORT))


def test_one_image_is_enough(run: Path, tiny: Tiny, synthetic: Images) -> None:
    before = Learner.load(run).model.memory
    learner = learn_more(run, synthetic("c", 1, seed=4), None, tiny(SHORT))
    assert learner.events[0].images == 1
    # The memory's own images are among those that are chosen from.
    assert len(pictures(learner.model.memory, "c") & pictures(before, "c")) >= 2
    assert torch.bincount(learner.model.memory.labels).tolist() == [3] * 4


def test_new_and_known_classes_are_learned_in_one_step(run: Path, tiny: Tiny, synthetic: Images, watcher: Any) -> None:
    fresh = synthetic("be", 6, seed=5)
    learner = learn_more(run, fresh, synthetic("abcde", 2, seed=1), tiny({**SHORT, "memory.total": 15}), observer=watcher)
    assert (learner.model.class_sets, learner.events) == ([("a", "b"), ("c", "d"), ("e",)], [])
    # Six new images of each class, and the memory's three of four.
    assert watcher.steps == [(3, ("e",), 24)]
    assert any("already known: 'b'; their images join the rehearsal memory" in text for text in watcher.messages)
    memory = learner.model.memory
    assert isinstance(memory, MemorySource)
    assert torch.bincount(memory.labels).tolist() == [3] * 5
    assert pictures(memory, "b") & pictures(fresh, "b")


@pytest.mark.parametrize(
    ("changes", "names", "error", "words"),
    [
        ({"classifier.epochs": 0}, "a", ConfigError, r"classifier\.epochs = 0 switches off"),
        ({"memory.total": 0}, "a", DataError, "without images of 'b', and the rehearsal memory has none"),
    ],
)
def test_what_cannot_refresh(
    changes: dict[str, Any], names: str, error: type[Exception], words: str, tiny: Tiny, synthetic: Images
) -> None:
    learner = Learner(tiny({**SHORT, **changes}))
    learner.learn(synthetic("ab"))
    before = learner.predict(synthetic("ab").images)
    with pytest.raises(error, match=words):
        learner.learn(synthetic(names, seed=5))
    assert (learner.predict(synthetic("ab").images), learner.events) == (before, [])


def test_without_a_memory_all_classes_refresh(tiny: Tiny, synthetic: Images) -> None:
    learner = Learner(tiny({**SHORT, "memory.total": 0}))
    learner.learn(synthetic("ab"))
    result = learner.learn(synthetic("ab", seed=5), synthetic("ab", 2, seed=1))
    assert (result.params_added, learner.model.memory, len(learner.results)) == (0, None, 1)
    assert learner.metrics()["last_top1"] == result.top1


def test_the_upper_bound_knows_no_refresh(tiny: Tiny, synthetic: Images) -> None:
    learner = Learner(tiny({**SHORT, "method.name": "bound"}))
    learner.learn(synthetic("ab"))
    with pytest.raises(DataError, match="no new class to learn"):
        learner.learn(synthetic("ab", seed=5))


def test_steps_go_on_after_a_refresh(run: Path, tiny: Tiny, synthetic: Images) -> None:
    learn_more(run, synthetic("a", 6, seed=5), None, tiny(SHORT))
    learner = learn_more(run, synthetic("ef"), synthetic("abcdef", 2, seed=1), tiny(SHORT))
    assert (len(learner.results), len(learner.events)) == (3, 1)
    assert learner.metrics()["last_top1"] == learner.results[-1].top1


class Stop(Observer):
    """Ends the process's work after an epoch, as an interrupt does."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def epoch_ends(self, record: EpochRecord) -> None:
        if record.epoch == self.epoch:
            raise KeyboardInterrupt


def test_a_refresh_that_was_stopped_leaves_the_run_and_goes_on(
    finished: Path, run: Path, tiny: Tiny, synthetic: Images, run_facts: Callable[[Path], dict[str, Any]], watcher: Any, tmp_path: Path
) -> None:
    fresh, test = synthetic("bd", 6, seed=5), synthetic("abcd", 2, seed=1)
    straight = shutil.copytree(run, tmp_path / "straight")
    learn_more(straight, fresh, test, tiny(SHORT))
    with pytest.raises(KeyboardInterrupt):
        learn_more(run, fresh, test, tiny(SHORT), observer=Stop(2))
    assert list(run.glob("checkpoints/002-2-classifier-0001.json"))
    images = synthetic("abcd", 3, seed=8).images
    assert Learner.load(run).predict(images) == Learner.load(finished).predict(images)
    learn_more(run, fresh, test, tiny(SHORT), observer=watcher)
    assert [record.epoch for record in watcher.records] == [2]
    ours, theirs = run_facts(run), run_facts(straight)
    for facts in (ours, theirs):
        for event in facts["metrics"]["events"]:
            event["seconds"] = event["latency_ms"] = None
    assert ours == theirs


def test_runs_of_older_versions_have_no_events(run: Path, synthetic: Images, tiny: Tiny) -> None:
    for path in run.glob("steps/*/learner.json"):
        manifest = load_manifest(path)
        del manifest["events"], manifest["lesson"]
        save_manifest(path, manifest)
    learner = Learner.load(run)
    assert (learner.events, learner.lesson) == ([], "")
    assert len(learn_more(run, synthetic("a", 6, seed=5), None, tiny(SHORT)).events) == 1
