from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from der_fast.config.key import Change
from der_fast.config.schema import Config
from der_fast.config.tree import keys_with
from der_fast.data import MemorySource
from der_fast.errors import ConfigError, DerFastError, DivergenceError
from der_fast.model.layout import MaskLayout
from der_fast.training.latency import Latency
from der_fast.training.learner import Learner
from der_fast.training.methods import method_of

Tiny = Callable[..., Config]
Images = Callable[..., MemorySource]


def test_before_the_first_step() -> None:
    learner = Learner()
    assert learner.class_names == ()
    for call in (lambda: learner.model, lambda: learner.metrics(), lambda: learner.predict([]), lambda: learner.evaluate(None)):
        with pytest.raises(DerFastError, match="call learn"):
            call()


def test_the_classifier_learns_what_it_is_shown(tiny: Tiny, synthetic: Images) -> None:
    learner = Learner(tiny({"model.width": 4, "first.epochs": 12, "first.milestones": (8,), "masks.init_low": 0.5}))
    learner.learn(synthetic("ab", 16), synthetic("ab", 8, seed=1))
    assert learner.results[0].top1 == 100
    assert {prediction.class_name for prediction in learner.predict(synthetic("b", 4, seed=2).images)} == {"b"}


def test_predictions(learned: tuple[Learner, Path], synthetic: Images) -> None:
    learner, _ = learned
    images = synthetic("abcdef", 2).images
    rows = learner.predict(images, top=3)
    assert len(rows) == 12
    for row in rows:
        assert (row.class_name, row.probability) == row.top[0]
        assert len(row.top) == 3
        assert [probability for _, probability in row.top] == sorted((probability for _, probability in row.top), reverse=True)
        assert {name for name, _ in row.top} <= set("abcdef")
    whole = learner.predict(images, top=99)
    assert all(len(row.top) == 6 and sum(p for _, p in row.top) == pytest.approx(1, abs=1e-5) for row in whole)
    assert learner.predict([Image.fromarray(image.numpy()) for image in images], top=3) == rows
    assert learner.predict([]) == []
    with pytest.raises(ConfigError, match="at least 1"):
        learner.predict(images, top=0)


def test_probabilities_have_the_temperature_of_the_classifier_stage(learned: tuple[Learner, Path], synthetic: Images) -> None:
    learner, _ = learned
    assert learner.model.ready.temperature == 5.0
    images = synthetic("abc")
    from der_fast.training.evaluation import logits_of

    logits, _ = logits_of(learner._context(images), learner.model.network.bank, learner.model.ready, images)
    wanted = torch.softmax(logits / 5, 1).max(1).values.tolist()
    assert [row.probability for row in learner.predict(images.images)] == pytest.approx(wanted, abs=1e-6)


def test_evaluation_by_class_set(learned: tuple[Learner, Path], synthetic: Images) -> None:
    learner, _ = learned
    test = synthetic("abcdef", 3, seed=4)
    whole = learner.evaluate(test)
    names = [row.class_name for row in learner.predict(test.images)]
    truth = [test.class_names[label] for label in test.labels.tolist()]
    right = [own == wanted for own, wanted in zip(names, truth, strict=True)]
    assert whole.top1 == pytest.approx(100 * sum(right) / 18)
    for step, chosen in enumerate(("ab", "cd", "ef")):
        hits = [hit for hit, wanted in zip(right, truth, strict=True) if wanted in chosen]
        assert whole.class_set_top1[step] == pytest.approx(100 * sum(hits) / 6)
    part = learner.evaluate(test.of_classes("fa"))
    assert part.class_set_top1[1] is None
    assert part.images == 6
    assert part.class_names == tuple("abcdef")
    assert [sum(row) for row in part.confusion] == [3, 0, 0, 0, 0, 3]


def test_metrics_have_every_key(learned: tuple[Learner, Path]) -> None:
    learner, folder = learned
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics == json.loads(json.dumps(learner.metrics()))
    lists = (
        "steps top1 top5 params params_unpruned params_added latency_ms latency_added_ms latency_unpruned_ms seconds class_set_top1 kept "
        "memory_per_class compaction_error"
    )
    for name in lists.split():
        assert len(metrics[name]) == 3, name
    for name in ["average_top1", "last_top1", "average_top5", "bwt", "average_params", "final_params"]:
        assert isinstance(metrics[name], (int, float)), name
    assert metrics["fwt"] is None
    assert (metrics["class_names"], metrics["steps"]) == (list("abcdef"), [["a", "b"], ["c", "d"], ["e", "f"]])
    assert [len(row) for row in metrics["class_set_top1"]] == [1, 2, 3]
    assert all(0 <= error <= 1e-5 for error in metrics["compaction_error"])
    assert all(value > 0 for name in ("latency_ms", "latency_added_ms", "latency_unpruned_ms", "seconds") for value in metrics[name])
    assert metrics["top5"][0] == 100
    assert (metrics["protocol"], metrics["name"], metrics["memory_per_class"]) == ("B0-3", "pruned", [5, 3, 2])
    assert metrics["config"]["model"]["width"] == 2
    assert {"der_fast", "python", "torch"} <= set(metrics["versions"])
    for row, added in zip(metrics["kept"], metrics["params_added"], strict=True):
        widths = {group: kept for group, (kept, _) in row.items()}
        assert learner.model.network.architecture.parameters(widths) == added
        assert {group: total for group, (_, total) in row.items()} == dict(learner.model.network.architecture.groups)
    heads = [metrics["params"][step] - sum(metrics["params_added"][: step + 1]) for step in range(3)]
    widths = learner.model.network.bank.widths
    assert heads == [(sum(widths[: step + 1]) + 1) * 2 * (step + 1) for step in range(3)]
    full = learner.model.network.architecture.parameters()
    assert metrics["params_unpruned"] == [step * full + (8 * step + 1) * 2 * step for step in (1, 2, 3)]


def test_the_unpruned_model_is_timed_as_a_whole(tiny: Tiny, synthetic: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    logits: list[tuple[int, ...]] = []

    def timed(image: torch.Tensor, *calls: Any) -> list[Latency]:
        whole, _, unpruned, added = (call(image) for call in calls)
        logits.append((*whole.shape, *unpruned.shape))
        assert added.shape == (1, 8)
        return [Latency(1.0, 0.1), Latency(2.0, 0.2), Latency(3.0, 0.3), Latency(4.0, 0.4)]

    monkeypatch.setattr("der_fast.training.measuring.latencies_ms", timed)
    learner = Learner(tiny({"first.epochs": 1, "later.epochs": 1}))
    for names in ("ab", "cd"):
        result = learner.learn(synthetic(names))
    assert logits == [(1, 2, 1, 2), (1, 4, 1, 4)]
    assert (result.latency_ms, result.latency_added_ms, result.latency_unpruned_ms, result.latency_added_unpruned_ms) == (
        1.0,
        2.0,
        3.0,
        4.0,
    )
    assert (result.latency_spread_ms, result.latency_added_spread_ms, result.latency_added_unpruned_spread_ms) == (0.1, 0.2, 0.4)


def test_the_time_of_a_step_is_without_the_reference_model(tiny: Tiny, synthetic: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, ahead = time.perf_counter, [0.0]

    def reference(*given: Any) -> tuple[float, list[Any]]:
        ahead[0] += 1e6
        return 50.0, []

    monkeypatch.setattr(time, "perf_counter", lambda: clock() + ahead[0])
    monkeypatch.setattr("der_fast.training.learner.train_reference", reference)
    learner = Learner(tiny({"method.fwt": True, "first.epochs": 1, "later.epochs": 1}))
    for names, seen in (("ab", "ab"), ("cd", "abcd")):
        result = learner.learn(synthetic(names), synthetic(seen, 2))
    assert (result.reference_top1, ahead[0]) == (50.0, 1e6)
    assert result.seconds < 1e5


def test_the_history_of_a_run(learned: tuple[Learner, Path]) -> None:
    rows = json.loads((learned[1] / "history.json").read_text())["epochs"]
    stages = [(row["step"], row["stage"], row["epoch"]) for row in rows]
    wanted = [(1, "representation", 1), (1, "representation", 2)]
    for step in (2, 3):
        wanted += [(step, stage, epoch) for stage in ("representation", "classifier") for epoch in (1, 2)]
    assert stages == wanted
    assert all(row["images_per_s"] > 0 for row in rows)


def test_the_mask_trajectory_of_every_step(learned: tuple[Learner, Path]) -> None:
    from safetensors import safe_open

    for step in (1, 2, 3):
        with safe_open(learned[1] / "steps" / f"{step:02d}" / "mask_logits.safetensors", "pt") as file:
            logits, offsets, groups = file.get_tensor("logits"), file.get_tensor("offsets"), json.loads(file.metadata()["groups"])
            times, prices, thresholds = (file.get_tensor(name) for name in ("times", "prices", "thresholds"))
        assert logits.shape == (len(times), offsets[-1])
        # One learned epoch, the cut, and the end of the step.
        assert times[0] == 0 and times[-3:].tolist() == [1, 1, 2] and (times.diff() >= 0).all()
        kept = MaskLayout(learned[0].model.network.architecture).by_group(logits[-1] > 0)
        assert {name: int(part.sum()) for name, part in kept.items()} == {n: k for n, (k, _) in learned[0].results[step - 1].kept.items()}
        assert len(groups) == len(offsets) - 1 == len(prices) == len(thresholds)
        # No budget, and so no cut.
        assert thresholds.max() == 0 and prices.max() == 1
        assert offsets.diff().tolist() == [learned[0].model.network.architecture.groups[name] for name in groups]


def test_a_diverged_step_leaves_the_learner_as_it_was(tiny: Tiny, synthetic: Images) -> None:
    learner = Learner(tiny({"later.lr": 1e30, "masks.enabled": False}))
    learner.learn(synthetic("ab"))
    before = learner.predict(synthetic("ab").images), learner.metrics()
    with pytest.raises(DivergenceError, match=r"step 2, representation stage, epoch 1.*first.lr"):
        learner.learn(synthetic("cd"))
    assert (learner.predict(synthetic("ab").images), learner.metrics()) == before
    learner.reconfigure(tiny({"masks.enabled": False}))
    learner.learn(synthetic("cd"))
    assert learner.class_names == tuple("abcd")


def test_an_error_while_measuring_leaves_the_learner_as_it_was(tiny: Tiny, synthetic: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = Learner(tiny())
    with monkeypatch.context() as patch:
        patch.setattr("der_fast.training.measuring.latencies_ms", lambda *parts: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            learner.learn(synthetic("ab"))
    assert (learner.class_names, learner.results, learner.records) == ((), [], [])
    learner.learn(synthetic("ab"))
    assert learner.class_names == ("a", "b")


def test_what_was_learned_fixes_some_keys(learned: tuple[Learner, Path], tiny: Tiny) -> None:
    learner = Learner.load(learned[1])
    changes = {
        "method.name": "replay", "model.backbone": "resnet32", "model.width": 4, "model.stem": "imagenet", "data.image_size": 9,
        "data.random_resized_crop": True,
        "data.mean": (0.1, 0.2, 0.3), "data.std": (0.1, 0.2, 0.3),
    }  # fmt: skip
    assert set(changes) == set(keys_with(Change.NEVER))
    for key, value in changes.items():
        with pytest.raises(ConfigError, match=f"{key} was .* now"):
            learner.reconfigure(tiny({key: value}))
    learner.reconfigure(tiny({"later.lr": 0.123, "data.flip": False}))
    assert learner.config.later.lr == 0.123


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "pruned"),
        ({"masks.enabled": False}, "unpruned"),
        ({"method.aux_weight": 0.0}, "pruned, without auxiliary loss"),
        ({"method.name": "replay"}, "without expansion"),
        ({"method.name": "bound"}, "bound"),
    ],
)
def test_variants_have_names(changes: dict[str, Any], name: str, tiny: Tiny) -> None:
    assert method_of(tiny(changes)).label(tiny(changes)) == name


@pytest.mark.parametrize("side", [64, 65])
def test_the_stem_goes_by_the_size_of_the_images(side: int, tiny: Tiny, synthetic: Images, tmp_path: Path) -> None:
    short = {"model.stem": "auto", "model.width": 1, "first.epochs": 1, "masks.enabled": False}
    learner = Learner(tiny(short))
    learner.learn(synthetic("ab", 2, side=side))
    assert learner.model.network.architecture.pool == (side > 64)
    assert Learner.load(learner.save(tmp_path)).model.network.architecture == learner.model.network.architecture


def test_the_seed_decides(tiny: Tiny, synthetic: Images) -> None:
    torch.manual_seed(1)
    learners = [Learner(tiny({"runtime.seed": seed})) for seed in (7, 7, 8)]
    for learner in learners:
        torch.rand(3)
        learner.learn(synthetic("ab"))
    heads = [learner.model.network.head.weight.detach() for learner in learners]
    assert torch.equal(heads[0], heads[1])
    assert heads[0].shape != heads[2].shape or not torch.equal(heads[0], heads[2])


def test_scarce_classes_are_noted_before_they_are_learned_and_once(tiny: Tiny, synthetic: Images, watcher: Any) -> None:
    learner = Learner(tiny({"memory.total": 40, "first.epochs": 1}), observer=watcher)
    learner.learn(synthetic("ab").subset(torch.arange(6)))
    notes = [text for text in watcher.messages if "quota" in text]
    assert len(notes) == 1
    assert notes[0].startswith("2 class(es) have fewer training images than their memory quota of 20: 'b' (1), 'a' (5). All are kept")
    assert "only 1 of every class" in notes[0]


def test_a_step_never_empties_the_memory_unasked(learned: tuple[Learner, Path], tiny: Tiny, synthetic: Images) -> None:
    learner = Learner.load(learned[1])
    learner.reconfigure(tiny({"memory.total": 7}))
    with pytest.raises(ConfigError, match="memory.total = 7 leaves no exemplar for each of 8 classes"):
        learner.learn(synthetic("gh"))
    assert learner.model.memory.fingerprint() == learned[0].model.memory.fingerprint()
