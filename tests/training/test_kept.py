"""Kept features of fixed views: what they are, when they are computed, and that nothing else about a run depends on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from der_fast.compaction.bank import FrozenBank
from der_fast.config.schema import Config
from der_fast.data import MemorySource
from der_fast.data.read.place import BEGINNING, Place
from der_fast.data.resident import ResidentImages
from der_fast.data.source import Batch
from der_fast.model.architecture import build_architecture
from der_fast.model.classifier import initialise_classifier
from der_fast.model.extractor import Extractor
from der_fast.seeds import generator
from der_fast.training.classifier_stage import train_classifier
from der_fast.training.context import Context
from der_fast.training.feed import FeatureFeed, Fed, LoadedFeed, ResidentFeed
from der_fast.training.kept import KeptFeatures, saves
from der_fast.training.learner import Learner
from der_fast.training.memory import balanced_subset
from der_fast.training.state import CLASSIFIER, StepState

Tiny = Callable[..., Config]
Images = Callable[..., MemorySource]
Contexts = Callable[..., Context]
CHOSEN = torch.tensor([7, 2, 3, 11, 0, 5, 9])


class Counting(FrozenBank):
    """Counts the images whose features it computes."""

    images = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.images += len(images)
        return super().forward(images)


class Torn(MemorySource):
    """A source with an image that cannot be read in its first `bad` passes."""

    bad = 10**6

    def batches(self, *arguments: Any, **rest: Any) -> Iterator[Batch]:
        self.bad -= 1
        for batch in super().batches(*arguments, **rest):
            keep = batch.indices != 3 if self.bad >= 0 else torch.ones(len(batch.indices), dtype=torch.bool)
            yield Batch(batch.images[keep], batch.labels[keep], batch.indices[keep], batch.place)


def bank_of(count: int = 2) -> Counting:
    architecture = build_architecture("resnet20", width=2)
    return Counting([Extractor(architecture).initialise(torch.Generator().manual_seed(seed)) for seed in range(count)])


def kept_of(context: Context, bank: FrozenBank, source: MemorySource, epochs: int = 100, **rest: Any) -> KeptFeatures:
    return KeptFeatures(context, bank, source, ("here", 2), 3, epochs, **rest)


def test_a_view_is_computed_once_and_is_what_the_extractors_make_of_those_crops(
    tiny: Tiny, synthetic: Images, context_for: Contexts
) -> None:
    source, bank = synthetic("abc"), bank_of()
    context = context_for(tiny(), source)
    kept = kept_of(context, bank, source, chosen=CHOSEN)
    keys, seen = [], []
    for epoch in range(7):
        kept.current.fill_(torch.nan)
        keys.append(kept.enter(epoch))
        seen.append(kept.gather(torch.arange(7)))
    assert bank.images == 3 * 7
    assert keys[:3] == keys[3:6] and keys[0] == keys[6] and len(set(keys)) == 3
    for view in range(3):
        drawn = context.train_transform.draw(keys[view], CHOSEN, source.image_size)
        features = bank(context.train_transform(source.images[CHOSEN], drawn))
        assert torch.equal(seen[view], features.bfloat16().float())
        assert torch.equal(seen[view], seen[view + 3])
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize(("views_that_fit", "passes"), [(0, 9), (1, 7), (10, 3)])
def test_what_exceeds_the_budget_is_computed_again_to_the_same_bits_and_said_once(
    views_that_fit: int, passes: int, tiny: Tiny, synthetic: Images, context_for: Contexts, watcher: Any
) -> None:
    source, bank = synthetic("abc"), bank_of()
    plenty = kept_of(context_for(tiny(), source), bank_of(), source)
    size = plenty.current.numel() * 2 / 2**30
    kept = kept_of(context_for(tiny({"runtime.features_gib": views_that_fit * size * 1.01}), source, watcher), bank, source)
    for epoch in range(9):
        assert plenty.enter(epoch) == kept.enter(epoch)
        assert torch.equal(plenty.current, kept.current)
    assert bank.images == passes * len(source)
    said = [line for line in watcher.messages if "features_gib" in line]
    assert len(said) == (views_that_fit < 3) and all(f"{views_that_fit} of 3 views fit" in line for line in said)


def test_a_view_that_no_epoch_uses_again_is_not_kept(tiny: Tiny, synthetic: Images, context_for: Contexts) -> None:
    source = synthetic("abc")
    kept = kept_of(context_for(tiny(), source), bank_of(), source, epochs=4)
    for epoch in range(4):
        kept.enter(epoch)
    assert list(kept._views) == [0]
    assert [saves(views, 4) for views in (0, 1, 3, 4, 5)] == [False, True, True, False, False]


def test_an_image_that_could_not_be_read_at_first_gets_its_features_when_it_can(
    tiny: Tiny, synthetic: Images, context_for: Contexts
) -> None:
    whole = synthetic("abc")
    source, bank = Torn(whole.images, whole.labels, whole.class_names), bank_of()
    context = context_for(tiny(), source)
    source.bad = 1
    kept = kept_of(context, bank, source)
    feed = LoadedFeed(context, source, None, 16, kept)
    (fed,) = list(feed.epoch(0, torch.Generator().manual_seed(0), BEGINNING))
    images, _, features = feed.inputs(*fed.tensors)
    assert len(images) == 15 and bank.images == 14 + 1
    assert torch.equal(features, bank(images).bfloat16().float())


def test_rows_without_a_readable_image_are_not_trained_on(tiny: Tiny, synthetic: Images, context_for: Contexts) -> None:
    whole = synthetic("abc")
    source = Torn(whole.images, whole.labels, whole.class_names)
    context = context_for(tiny(), source)
    kept = kept_of(context, bank_of(), source, chosen=CHOSEN)
    feed = FeatureFeed(context, kept, source.labels[CHOSEN], 4)
    fed = list(feed.epoch(0, torch.Generator().manual_seed(0), BEGINNING))
    assert [part.images for part in fed] == [4, 2]
    assert sorted(torch.cat([part.tensors[0] for part in fed]).tolist()) == [0, 1, 3, 4, 5, 6]


def passes_of(feed: LoadedFeed | ResidentFeed, epochs: int, start: Place = BEGINNING) -> list[tuple[Fed, tuple[torch.Tensor, ...]]]:
    return [(fed, feed.inputs(*fed.tensors)) for epoch in range(epochs) for fed in feed.epoch(epoch, generator(1, "draws", epoch), start)]


@pytest.mark.parametrize("views", [0, 2])
@pytest.mark.parametrize("chosen", [None, CHOSEN])
def test_resident_images_are_the_loaded_ones_bit_for_bit(
    views: int, chosen: torch.Tensor | None, tiny: Tiny, synthetic: Images, context_for: Contexts
) -> None:
    source = synthetic("abc")
    context = context_for(tiny(), source)

    def kept() -> KeptFeatures | None:
        return KeptFeatures(context, bank_of(), source, ("here",), views, 4, chosen) if views else None

    images = ResidentImages(source.images, source.labels, context.train_transform, torch.float32, channels_last=True, backend="reference")
    for start in (BEGINNING, Place(1)):
        loaded = passes_of(LoadedFeed(context, source, chosen, 4, kept()), 3, start)
        resident = passes_of(ResidentFeed(context, images, chosen, 4, kept()), 3, start)
        assert len(loaded) == len(resident) == 3 * ((4 if chosen is None else 2) - start.batches)
        for (one, inputs), (other, others) in zip(loaded, resident, strict=True):
            assert (one.images, one.place) == (other.images, other.place)
            assert len(inputs) == len(others) == 2 + bool(views)
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(inputs, others, strict=True))


def test_the_classifier_on_one_view_is_gradient_descent_on_its_features(tiny: Tiny, synthetic: Images, context_for: Contexts) -> None:
    source = synthetic("abc", 4)
    keys = {"classifier.momentum": 0.0, "classifier.weight_decay": 0.0, "classifier.batch_size": 64, "classifier.milestones": ()}
    context = context_for(tiny({**keys, "classifier.views": 1}), source)
    bank = bank_of()
    state = StepState(2, {"head": torch.nn.Linear(16, 3)}, stage=CLASSIFIER, stages=1)
    train_classifier(context, state, bank, source)
    assert bank.images == len(source)

    layer = torch.nn.Linear(16, 3)
    initialise_classifier(layer, generator(7, CLASSIFIER, 2, "start"))
    chosen = balanced_subset(source.labels, generator(7, CLASSIFIER, 2, "subset"))
    kept = KeptFeatures(context, bank, source, (CLASSIFIER, 2), 1, 2, chosen)
    kept.enter(0)
    for _ in range(2):
        loss = F.cross_entropy(layer(kept.current.float()) / 5.0, source.labels[chosen])
        weight, bias = torch.autograd.grad(loss, [layer.weight, layer.bias])
        layer.weight.data -= 0.05 * weight
        layer.bias.data -= 0.05 * bias
    assert torch.allclose(state.head.weight, layer.weight, atol=1e-6)
    assert torch.allclose(state.head.bias, layer.bias, atol=1e-6)


def run(config: Config, synthetic: Images) -> Learner:
    learner = Learner(config)
    for names, seen in (("ab", "ab"), ("cd", "abcd")):
        learner.learn(synthetic(names), synthetic(seen, 2, seed=1))
    return learner


def test_a_run_with_views_does_not_depend_on_where_they_are_kept_and_one_without_not_on_them(tiny: Tiny, synthetic: Images) -> None:
    keys = {"later.epochs": 3, "classifier.epochs": 3, "later.views": 1, "classifier.views": 2}
    weights = []
    for changes in (
        keys,
        {**keys, "runtime.features_gib": 0.0},
        {**keys, "later.views": 3, "classifier.views": 3},
        {**keys, "later.views": 0, "classifier.views": 0},
    ):
        learner = run(tiny(changes), synthetic)
        assert learner.model.network.head is not None
        weights.append(learner.model.network.head.weight)
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[2], weights[3])
    assert not torch.equal(weights[0], weights[2])
