from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from der_fast.config.schema import Config
from der_fast.data import MemorySource
from der_fast.model.extractor import Extractor
from der_fast.training.context import Context
from der_fast.training.hooks import Hooks
from der_fast.training.learner import Learner
from der_fast.training.methods.der.method import Der, begin_step
from der_fast.training.methods.der.pruning import kept_share
from der_fast.training.methods.der.state import DerState
from der_fast.training.model import Model
from der_fast.training.rehearsal import rehearsal
from der_fast.training.step import learn_step

Tiny = Callable[..., Config]
Images = Callable[..., MemorySource]
Contexts = Callable[..., Context]


def learned(config: Config, synthetic: Images, *steps: str) -> Learner:
    learner = Learner(config)
    for names in steps:
        learner.learn(synthetic(names))
    return learner


def test_an_extractor_starts_from_the_dense_weights_of_the_one_before(tiny: Tiny, synthetic: Images, context_for: Contexts) -> None:
    config = tiny()
    learner = learned(config, synthetic, "ab")
    state = begin_step(context_for(config, synthetic("cd")), learner.model, 2)
    start = state.extractor.state_dict()
    assert start.keys() == learner.model.network.dense.keys()
    assert all(torch.equal(value, learner.model.network.dense[name]) for name, value in start.items())
    assert learner.results[0].params_added < learner.model.network.architecture.parameters(), "nothing was pruned: the test shows nothing"
    assert not torch.equal(start["norm.running_mean"], torch.zeros_like(start["norm.running_mean"]))
    assert state.masks.logits.min() >= -0.5
    assert state.masks.logits.max() <= 2.0


def test_the_classifier_starts_from_the_old_one(tiny: Tiny, synthetic: Images, context_for: Contexts) -> None:
    config = tiny()
    learner = learned(config, synthetic, "ab")
    old, state = learner.model.network.head, begin_step(context_for(config, synthetic("cd")), learner.model, 2)
    assert torch.equal(state.head.weight[:2, : old.in_features], old.weight)
    assert torch.equal(state.head.bias[:2], old.bias)
    assert state.head.out_features == 4
    assert state.head.in_features == old.in_features + 8


def test_a_step_leaves_the_model_before_it_unchanged(tiny: Tiny, synthetic: Images, context_for: Contexts) -> None:
    config = tiny()
    learner = learned(config, synthetic, "ab")
    model, source = learner.model, synthetic("cd")
    weights = {**model.network.bank.extractors[0].arena.tensors(), **model.network.head.state_dict()}
    before = {name: value.clone() for name, value in weights.items()}
    assert len(before) > 20
    dense = {name: value.clone() for name, value in model.network.dense.items()}
    context = context_for(config, source)
    finished, *_ = learn_step(context, Der(), model, begin_step(context, model, 2), source)
    assert finished.class_sets == [("a", "b"), ("c", "d")]
    assert model.class_sets == [("a", "b")]
    assert all(torch.equal(value, before[name]) for name, value in weights.items())
    assert all(torch.equal(value, dense[name]) for name, value in model.network.dense.items())
    old, new = model.network.bank.extractors[0], finished.network.bank.extractors[0]
    assert torch.equal(old.arena.storage, new.arena.storage)


def test_the_compact_extractor_computes_what_the_masked_one_does(tiny: Tiny, synthetic: Images, context_for: Contexts) -> None:
    # Half of all channels start below zero.
    config = tiny({"masks.init_low": -1.0, "masks.init_high": 1.0, "masks.lr": 0.0, "masks.floor": 0.25, "model.width": 4})
    learner = Learner(config)
    for names in ("ab", "cd", "ef"):
        learner.learn(synthetic(names))
        result = learner.results[-1]
        assert 0.05 < result.kept_share < 0.6
        assert 0 <= result.compaction_error <= 1e-5
        dense = Extractor(learner.model.network.architecture)
        dense.load_state_dict(learner.model.network.dense)
        keep = torch.cat([torch.tensor(row) for row in kept_channels(learner)])
        images = context_for(config, synthetic("xyz")).test_transform(synthetic("xyz").images)
        with torch.no_grad():
            masked = dense.eval()(images, keep.float())
            compact = learner.model.network.bank.extractors[-1](images)
        features = keep[step_layout(learner).slice_of(learner.model.network.architecture.features)]
        assert compact.shape == (15, int(features.sum()))
        assert (masked[:, features] - compact).abs().max() <= 1e-5 * masked.abs().max()


def step_layout(learner: Learner) -> Any:
    from der_fast.model.layout import MaskLayout

    return MaskLayout(learner.model.network.architecture)


def kept_channels(learner: Learner) -> Sequence[list[bool]]:
    """The channels that the last step kept, by group, from the logits in its log and the floor of a quarter."""
    from der_fast.compaction.plan import with_floor

    layout, logits = step_layout(learner), learner._step_files[len(learner.results)]["mask_logits.safetensors"][0]["logits"][-1]
    keep = with_floor(layout, logits, logits > 0, 0.25)
    assert kept_share(layout, keep) == learner.results[-1].kept_share
    return [part.tolist() for part in layout.by_group(keep).values()]


@pytest.mark.parametrize("target", [0.1, 0.5])
@pytest.mark.parametrize("settle", [0.0, 0.5])
def test_a_step_meets_its_target(target: float, settle: float, tiny: Tiny, synthetic: Images) -> None:
    learner = learned(tiny({"masks.target_params": target, "masks.settle": settle, "masks.floor": 0.0}), synthetic, "ab")
    assert learner.results[0].kept_share <= target
    # Folded, a batch-norm is one number per channel; before, it is two.
    tensors = learner.model.network.bank.extractors[0].arena.tensors()
    counted = sum(value.numel() * (1 if name.endswith(".weight") else 2) for name, value in tensors.items())
    assert learner.results[0].params_added == counted


def test_images_of_memory_and_new_classes_are_labelled_in_learning_order(tiny: Tiny, synthetic: Images) -> None:
    learner = learned(tiny({"memory.total": 8}), synthetic, "ba")
    source = rehearsal(learner.model, synthetic("dc"))
    assert source.class_names == ("b", "a", "d", "c")
    assert source.labels.bincount().tolist() == [4, 4, 5, 5]
    memory = learner.model.memory
    assert torch.equal(source.images[10:], memory.images)
    assert torch.equal(source.images[source.labels == 2], synthetic("dc").images[:5])


@pytest.mark.parametrize(
    ("changes", "counts"),
    [
        ({"memory.total": 12}, [[5, 5], [3] * 4, [2] * 6]),
        ({"memory.total": 7}, [[3, 3], [1] * 4, [1] * 6]),
        ({"memory.per_class": 2}, [[2, 2], [2] * 4, [2] * 6]),
        ({"memory.per_class": 50}, [[5, 5], [5] * 4, [5] * 6]),
    ],
)
def test_the_memory_after_every_step(changes: dict[str, Any], counts: list[list[int]], tiny: Tiny, synthetic: Images) -> None:
    learner = Learner(tiny({"masks.enabled": False, "first.epochs": 1, "later.epochs": 1, "classifier.epochs": 1, **changes}))
    earlier: dict[str, torch.Tensor] = {}
    for names, wanted in zip(("ab", "cd", "ef"), counts, strict=True):
        learner.learn(synthetic(names))
        memory = learner.model.memory
        assert memory.labels.bincount().tolist() == wanted
        assert learner.results[-1].memory_per_class == max(wanted)
        for label, name in enumerate(learner.class_names):
            images = memory.images[memory.labels == label]
            if name in earlier:
                # The rank order is kept: a smaller quota is a prefix.
                assert torch.equal(images, earlier[name][: len(images)])
            earlier[name] = images


@pytest.mark.parametrize("changes", [{"memory.total": 0}, {"memory.per_class": 0}])
def test_without_memory(changes: dict[str, Any], tiny: Tiny, synthetic: Images) -> None:
    learner = learned(tiny({**changes, "masks.enabled": False}), synthetic, "ab", "cd")
    assert learner.model.memory is None
    assert [result.memory_per_class for result in learner.results] == [0, 0]
    assert learner.class_names == tuple("abcd")


def test_a_class_with_fewer_images_than_its_quota_is_kept_whole_and_named(tiny: Tiny, synthetic: Images, watcher: Any) -> None:
    learner = Learner(tiny({"memory.per_class": 5}), observer=watcher)
    learner.learn(synthetic("ab", 6).subset(torch.tensor([0, 1, 2, 6, 7, 8, 9, 10, 11])))
    assert learner.model.memory.labels.bincount().tolist() == [3, 5]
    assert [text.partition(". ")[0] for text in watcher.messages if "quota" in text] == [
        "1 class(es) have fewer training images than their memory quota of 5: 'a' (3)"
    ]


NETWORKS = [(name, "small") for name in ("resnet20", "resnet32", "resnet18", "preact_resnet18", "resnet34", "resnet50")]


@pytest.mark.parametrize(("backbone", "stem"), [*NETWORKS, ("resnet18", "imagenet"), ("resnet50", "imagenet")])
def test_every_backbone_learns_two_steps(backbone: str, stem: str, tiny: Tiny, synthetic: Images) -> None:
    short = {f"{stage}.epochs": 1 for stage in ("first", "later", "classifier")}
    learner = learned(tiny({"model.backbone": backbone, "model.stem": stem, "model.width": 2, **short}), synthetic, "ab", "cd")
    # Images of 8 × 8 pixels are 1 × 1 at the end of four stages: many layers of batch-norm over a handful of values may be ill-conditioned,
    # and then double precision has decided.
    small = backbone in ("resnet20", "resnet32")
    for result in learner.results:
        said = any(note.startswith(f"step {result.step}: the extractor is ill-conditioned") for note in learner.notes)
        assert result.compaction_error <= 1e-5 or (said and not small)
    assert all(0 < result.kept_share < 1 for result in learner.results)
    assert len(learner.predict(synthetic("a").images)) == 5


def emptied(state: DerState) -> bool:
    """Prune every channel of the first stream; the masks do not change any more (masks.lr is 0)."""
    assert state.masks is not None
    with torch.no_grad():
        state.masks.logits[state.masks.layout.slice_of(state.extractor.architecture.stem.target)] = -5.0
    return True


@pytest.mark.parametrize(("empty_step", "backbone"), [(1, "resnet20"), (2, "resnet20"), (1, "resnet18"), (2, "preact_resnet18")])
def test_an_extractor_without_channels(empty_step: int, backbone: str, tiny: Tiny, synthetic: Images, watcher: Any, tmp_path: Any) -> None:
    config = tiny({"masks.lr": 0.0, "masks.floor": 0.0, "model.backbone": backbone, "later.epochs": 4})
    learner = Learner(config, observer=watcher)
    for step, names in enumerate(("ab", "cd", "ef"), 1):
        hooks = Hooks(restore=emptied) if step == empty_step else Hooks()
        learner._learn(synthetic(names), synthetic("abcdef"[: 2 * step], seed=1), hooks)
    widths = learner.model.network.bank.widths
    assert [width == 0 for width in widths] == [step == empty_step for step in (1, 2, 3)]
    assert learner.results[empty_step - 1].params_added == 0
    assert learner.results[empty_step - 1].compaction_error == 0
    assert any(f"step {empty_step}: a residual stream kept no channel" in text for text in watcher.messages)
    assert any(f"step {empty_step}: a residual stream" in note for note in learner.metrics()["notes"])
    for prediction in learner.predict(synthetic("abcdef").images, top=6):
        assert sum(probability for _, probability in prediction.top) == pytest.approx(1, abs=1e-5)
    # The next step learns as if nothing had happened.
    losses = [record.loss for record in learner.records if record.step == 3 and record.stage == "representation"]
    assert losses[-1] < losses[0]
    again = Learner.load(learner.save(tmp_path))
    assert again.predict(synthetic("abcdef").images) == learner.predict(synthetic("abcdef").images)


def test_the_classifier_of_an_empty_first_extractor_is_its_bias(tiny: Tiny, synthetic: Images) -> None:
    learner = Learner(tiny({"masks.lr": 0.0, "masks.floor": 0.0}))
    learner._learn(synthetic("ab"), None, Hooks(restore=emptied))
    model: Model = learner.model
    assert tuple(model.network.head.weight.shape) == (2, 0)
    wanted = torch.softmax(model.network.head.bias.detach(), 0).max()
    assert {prediction.probability for prediction in learner.predict(synthetic("ab").images)} == {float(wanted)}
