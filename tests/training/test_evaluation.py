from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from der_fast.compaction.bank import FrozenBank
from der_fast.config.schema import Config
from der_fast.data import MemorySource
from der_fast.data.source import Batch
from der_fast.model.architecture import build_architecture
from der_fast.model.classifier import new_classifier
from der_fast.model.extractor import Extractor
from der_fast.model.readout import linear_readout
from der_fast.training.context import Context
from der_fast.training.evaluation import features_by_class, logits_of, score
from der_fast.training.progress import Observer


def test_score_by_hand() -> None:
    logits = torch.zeros(4, 7)
    logits[0, 0] = 9.0  # right
    logits[1] = torch.tensor([7.0, 1.0, 6.0, 5.0, 4.0, 3.0, 2.0])  # label 1 comes last
    logits[2] = torch.tensor([7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0])  # label 4 is the fifth
    logits[3, 6] = 9.0  # right
    labels = torch.tensor([0, 1, 4, 6])
    found = score(logits, labels, "abcdefg", [("a", "b"), ("c", "d"), ("e",), ("f", "g")])
    assert (found.top1, found.top5, found.images) == (50.0, 75.0, 4)
    assert found.class_set_top1 == [50.0, None, 0.0, 100.0]
    confusion = [[0] * 7 for _ in range(7)]
    confusion[0][0] = confusion[6][6] = confusion[1][0] = confusion[4][0] = 1
    assert found.confusion == confusion
    assert found.class_names == tuple("abcdefg")


@pytest.mark.parametrize("classes", [1, 3, 5])
def test_top5_is_100_while_there_are_five_classes_or_fewer(classes: int) -> None:
    logits = torch.randn(20, classes, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, classes, (20,), generator=torch.Generator().manual_seed(1))
    found = score(logits, labels, [str(index) for index in range(classes)], [[str(index) for index in range(classes)]])
    assert found.top5 == 100.0
    assert sum(map(sum, found.confusion)) == 20


def test_features_and_logits_come_in_order_without_augmentation(
    tiny: Callable[..., Config], synthetic: Callable[..., MemorySource], context_for: Callable[..., Context]
) -> None:
    source = synthetic("ab", 5)
    context = context_for(tiny({"runtime.eval_batch_size": 3}), source)
    generator = torch.Generator().manual_seed(0)
    extractor = Extractor(build_architecture("resnet20", width=2)).initialise(generator)
    bank, head = FrozenBank([extractor]), new_classifier(extractor.features, 2, generator)
    images = context.test_transform(source.images)
    with torch.no_grad():
        features = bank(images)
    for label, positions, rows in features_by_class(context, bank, source):
        assert positions.tolist() == (source.labels == label).nonzero().flatten().tolist()
        assert torch.allclose(rows, features[positions], atol=1e-6)
    logits, positions = logits_of(context, bank, linear_readout(head), source)
    assert positions.tolist() == list(range(len(source)))
    assert torch.allclose(logits, head(features), atol=1e-5)
    assert not logits.requires_grad


class Gappy(MemorySource):
    """A source of which every third image turns out to be unreadable."""

    def batches(self, *args: Any, **keywords: Any) -> Iterator[Batch]:
        for batch in super().batches(*args, **keywords):
            kept = batch.indices % 3 != 0
            yield Batch(batch.images[kept], batch.labels[kept], batch.indices[kept])


def test_images_that_cannot_be_read_do_not_shift_the_others(
    tiny: Callable[..., Config], synthetic: Callable[..., MemorySource], context_for: Callable[..., Context]
) -> None:
    whole = synthetic("ab", 5)
    mixed = torch.tensor([0, 5, 1, 6, 2, 7, 3, 8, 4, 9])
    source = Gappy(whole.images[mixed], whole.labels[mixed], whole.class_names)
    context = context_for(tiny({"runtime.eval_batch_size": 4}), source)
    generator = torch.Generator().manual_seed(0)
    extractor = Extractor(build_architecture("resnet20", width=2)).initialise(generator)
    bank, head = FrozenBank([extractor]), new_classifier(extractor.features, 2, generator)
    with torch.no_grad():
        features = bank(context.test_transform(source.images))
    logits, positions = logits_of(context, bank, linear_readout(head), source)
    assert positions.tolist() == [1, 2, 4, 5, 7, 8]
    assert torch.allclose(logits, head(features)[positions], atol=1e-5)
    found = list(features_by_class(context, bank, source))
    assert [label for label, _, _ in found] == [0, 1]
    for label, positions, rows in found:
        assert positions.tolist() == [index for index in range(10) if index % 3 and source.labels[index] == label]
        assert torch.allclose(rows, features[positions], atol=1e-6)


def test_features_of_one_class_and_one_batch_are_held_at_a_time(
    tiny: Callable[..., Config], synthetic: Callable[..., MemorySource], context_for: Callable[..., Context]
) -> None:
    """Counted in tensors that are alive: herding over a million images takes no more memory than over its largest class."""
    source = synthetic("abcdef", 8)
    context = context_for(tiny({"runtime.eval_batch_size": 3}), source)
    width = 37

    class Wide(FrozenBank):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.ones(len(images), width)

    def held() -> int:
        return sum(len(entry) for entry in gc.get_objects() if type(entry) is torch.Tensor and entry.shape[1:] == (width,))

    counts = [(len(rows), held()) for _, _, rows in features_by_class(context, Wide(), source)]
    # A class in one piece and in those of its batches, and the batch that begins the next class: of 48 rows in all.
    assert [count for count, _ in counts] == [8] * 6 and 0 < max(most for _, most in counts) <= 2 * 8 + 2 * 3


def test_passes_over_images_are_told(
    tiny: Callable[..., Config], synthetic: Callable[..., MemorySource], context_for: Callable[..., Context]
) -> None:
    told: list[tuple[str, int, int]] = []

    class Watching(Observer):
        def images_pass(self, work: str, done: int, images: int) -> None:
            told.append((work, done, images))

    source = synthetic("ab", 5)
    context = context_for(tiny({"runtime.eval_batch_size": 4}), source, Watching())
    extractor = Extractor(build_architecture("resnet20", width=2)).initialise(torch.Generator().manual_seed(0))
    bank, head = FrozenBank([extractor]), new_classifier(extractor.features, 2, torch.Generator())
    logits_of(context, bank, head, source)
    list(features_by_class(context, bank, source))
    assert told == [(work, done, 10) for work in ("evaluation", "herding") for done in (0, 4, 8, 10)]
