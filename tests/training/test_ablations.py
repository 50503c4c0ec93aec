"""Every ablation is one switch, and does what it says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from der_fast.config.schema import Config
from der_fast.data import MemorySource
from der_fast.errors import DataError
from der_fast.training.learner import Learner
from der_fast.training.run import run_protocol

Tiny = Callable[..., Config]
Images = Callable[..., MemorySource]


def run(config: Config, synthetic: Images, observer: Any = None, out: Path | None = None) -> Learner:
    return run_protocol(config, synthetic("abcdef"), synthetic("abcdef", 2, seed=1), out, observer=observer)


def test_without_pruning(tiny: Tiny, synthetic: Images) -> None:
    metrics = run(tiny({"masks.enabled": False}), synthetic).metrics()
    assert metrics["params"] == metrics["params_unpruned"]
    assert metrics["kept"] == [None, None, None]
    assert metrics["kept_share"] == [1.0, 1.0, 1.0]
    assert metrics["name"] == "unpruned"


def test_without_the_auxiliary_loss(tiny: Tiny, synthetic: Images, watcher: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("der_fast.training.methods.der.method.new_classifier", lambda *parts: seen.append(parts))
    learner = run(tiny({"method.aux_weight": 0.0}), synthetic, watcher)
    assert seen == []
    assert learner.metrics()["name"] == "pruned, without auxiliary loss"


def test_without_expansion(tiny: Tiny, synthetic: Images, watcher: Any, tmp_path: Path) -> None:
    learner = run(tiny({"method.name": "replay"}), synthetic, watcher, tmp_path)
    metrics = learner.metrics()
    assert len(learner.model.network.bank) == 1
    full = learner.model.network.architecture.parameters()
    assert metrics["params"] == [full + 9 * 2 * step for step in (1, 2, 3)] == metrics["params_unpruned"]
    # One extractor, but the same memory: 5 images per new class and what the memory holds of the old ones.
    assert watcher.steps == [(1, ("a", "b"), 10), (2, ("c", "d"), 10 + 2 * 5), (3, ("e", "f"), 10 + 4 * 3)]
    assert [record.stage for record in watcher.records if record.step == 2] == ["representation"] * 2 + ["classifier"] * 2
    loaded = Learner.load(tmp_path)
    images = synthetic("abcdef").images
    assert loaded.predict(images) == learner.predict(images)
    loaded.learn(synthetic("gh"))
    assert len(loaded.model.network.bank) == 1
    assert Learner.load(loaded.save(tmp_path)).class_names == tuple("abcdefgh")
    assert len(list(tmp_path.glob("extractors/*"))) == 2


def test_one_extractor_goes_on_where_it_stood(tiny: Tiny, synthetic: Images) -> None:
    # With a vanishing learning rate the extractor of step 2 is that of step 1 (but for batch-norm's statistics).
    learner = Learner(tiny({"method.name": "replay", "later.lr": 1e-12}))
    learner.learn(synthetic("ab"))
    before = learner.model.network.dense["stem.weight"].clone()
    learner.learn(synthetic("cd"))
    assert torch.allclose(learner.model.network.dense["stem.weight"], before, atol=1e-8)


def test_the_bound(tiny: Tiny, synthetic: Images, watcher: Any, tmp_path: Path) -> None:
    learner = run(tiny({"method.name": "bound"}), synthetic, watcher, tmp_path)
    assert watcher.steps == [(1, ("a", "b"), 10), (2, ("c", "d"), 20), (3, ("e", "f"), 30)]
    assert {record.stage for record in watcher.records} == {"representation"}
    metrics = learner.metrics()
    assert (metrics["name"], metrics["memory_per_class"], metrics["kept"]) == ("bound", [0, 0, 0], [None] * 3)
    assert [len(row) for row in metrics["class_set_top1"]] == [1, 2, 3]
    assert learner.model.memory is None
    assert len(learner.model.network.bank) == 1
    assert learner.model.ready.temperature == 1.0
    loaded = Learner.load(tmp_path)
    test = synthetic("abcdef", 3)
    assert loaded.predict(test.images) == learner.predict(test.images)
    assert loaded.evaluate(test) == learner.evaluate(test)
    with pytest.raises(DataError, match="all seen classes"):
        loaded.learn(synthetic("gh"))
    loaded.learn(synthetic("abcdefgh"))
    assert Learner.load(loaded.save(tmp_path)).class_names == tuple("abcdefgh")


def test_the_bound_starts_from_nothing_in_every_step(tiny: Tiny, synthetic: Images) -> None:
    def last_weights(order: tuple[str, ...]) -> torch.Tensor:
        learner = Learner(tiny({"method.name": "bound", "later.lr": 1e-12}))
        for names in order:
            learner.learn(synthetic(names))
        return learner.model.network.dense["stem.weight"]

    # What was learned in the first step plays no part in the second.
    assert torch.equal(last_weights(("ab", "abcd")), last_weights(("xy", "xycd")))


def test_reference_models_are_trained_only_when_asked_for(tiny: Tiny, synthetic: Images, watcher: Any) -> None:
    plain = run(tiny(), synthetic)
    assert plain.metrics()["fwt"] is None
    assert all(result.reference_top1 is None for result in plain.results)
    asked = run(tiny({"method.fwt": True}), synthetic, watcher)
    stages = [(record.step, record.epoch) for record in watcher.records if record.stage == "reference"]
    assert stages == [(2, 1), (2, 2), (3, 1), (3, 2)]
    assert [(row.step, row.epoch) for row in asked.records if row.stage == "reference"] == stages
    first, *later = asked.results
    assert first.reference_top1 is None
    wanted = sum(result.class_set_top1[-1] - result.reference_top1 for result in later) / 2
    assert asked.metrics()["fwt"] == pytest.approx(wanted)
    # The reference models change nothing else.
    assert asked.metrics()["top1"] == plain.metrics()["top1"]
    for one, other in zip(asked.model.network.bank.extractors, plain.model.network.bank.extractors, strict=True):
        assert torch.equal(one.arena.storage, other.arena.storage)


def test_reference_models_learn_the_same_images_and_are_asked_for_new_classes(
    tiny: Tiny, synthetic: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    from der_fast.training import reference_model

    trained, asked = [], []
    stage, score = reference_model.CrossEntropyStage, reference_model.score

    def note_stage(context: Any, state: Any, source: MemorySource, *rest: Any, **named: Any) -> Any:
        trained.append((sorted(state.parts), source.labels.bincount().tolist()))
        return stage(context, state, source, *rest, **named)

    def note_score(logits: torch.Tensor, labels: torch.Tensor, *rest: Any) -> Any:
        asked.append((sorted(labels.unique().tolist()), logits.shape[1]))
        return score(logits, labels, *rest)

    monkeypatch.setattr(reference_model, "CrossEntropyStage", note_stage)
    monkeypatch.setattr(reference_model, "score", note_score)
    run(tiny({"method.fwt": True}), synthetic)
    # One extractor from random weights, without masks and auxiliary classifier; five images per new class, and the memory.
    assert trained == [(["extractor", "head"], [5] * 4), (["extractor", "head"], [3] * 4 + [5] * 2)]
    assert asked == [([2, 3], 4), ([4, 5], 6)]


def test_without_test_images_of_the_new_classes_there_is_no_reference(tiny: Tiny, synthetic: Images, watcher: Any) -> None:
    learner = Learner(tiny({"method.fwt": True}), observer=watcher)
    learner.learn(synthetic("ab"), synthetic("ab", 2))
    learner.learn(synthetic("cd"), synthetic("ab", 2))
    learner.learn(synthetic("ef"))
    assert not [record for record in watcher.records if record.stage == "reference"]
    metrics = learner.metrics()
    assert (metrics["fwt"], metrics["bwt"], metrics["average_top1"], metrics["last_top1"]) == (None, None, None, None)
    assert metrics["class_set_top1"][1:] == [[metrics["class_set_top1"][1][0], None], [None, None, None]]


@pytest.mark.parametrize("epochs", [0, 1])
def test_without_the_classifier_stage(epochs: int, tiny: Tiny, synthetic: Images, watcher: Any) -> None:
    learner = run(tiny({"classifier.epochs": epochs}), synthetic, watcher)
    assert sum(record.stage == "classifier" for record in watcher.records) == 2 * epochs
    assert learner.model.ready.temperature == (5.0 if epochs else 1.0)


def test_the_papers_schedule_does_not_settle(tiny: Tiny, synthetic: Images, watcher: Any) -> None:
    run(tiny({"masks.settle": 0.0}), synthetic, watcher)
    assert not any(record.settled for record in watcher.records)


def test_bfloat16_changes_the_extractors_numbers_and_nothing_else(tiny: Tiny, synthetic: Images, tmp_path: Path) -> None:
    plain = run(tiny({"runtime.precision": "fp32"}), synthetic)
    half = run(tiny({"runtime.precision": "bf16"}), synthetic, out=tmp_path)
    assert {extractor.arena.dtype for extractor in half.model.network.bank.extractors} == {torch.float32}
    assert {extractor.dtype for extractor in half.model.network.bank.extractors} == {torch.bfloat16}
    assert {parameter.dtype for parameter in half.model.network.head.parameters()} == {torch.float32}
    assert {value.dtype for value in half.model.network.dense.values()} == {torch.float32}
    # What remains is counted, compared and saved in single precision.
    assert all(result.compaction_error <= 1e-5 for result in half.results)
    assert Learner.load(tmp_path).predict(synthetic("abc").images) == half.predict(synthetic("abc").images)
    first = [next(row.loss for row in learner.records) for learner in (plain, half)]
    assert first[0] != first[1]
    assert first[0] == pytest.approx(first[1], rel=0.1)
