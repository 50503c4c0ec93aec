from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from der_fast.config.schema import Config
from der_fast.data import MemorySource, transforms_for
from der_fast.data.read.library import read_settings
from der_fast.data.sets.dataset import as_source
from der_fast.data.storage import from_record, record_of
from der_fast.errors import DataError
from der_fast.training.learner import Learner
from der_fast.training.sources import check_test, check_train, counts_by_class, without_empty_classes

Tiny = Callable[..., Config]
Images = Callable[..., MemorySource]


class Pictures:
    """A map-style data set of Pillow images of the given (width, height)."""

    def __init__(self, sizes: Sequence[tuple[int, int]], labels: Sequence[int], classes: Sequence[str] | None = None) -> None:
        self.sizes, self.labels = sizes, labels
        if classes is not None:
            self.classes = classes

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        pixels = np.random.default_rng(index).integers(0, 256, (*self.sizes[index % len(self.sizes)][::-1], 3), dtype=np.uint8)
        return Image.fromarray(pixels), self.labels[index]


def test_a_source_is_taken_as_it_is(tiny: Tiny, synthetic: Images) -> None:
    source = synthetic("ab")
    assert as_source(source, tiny().data, (3, 3)) is source


def test_a_source_that_lacks_something_is_refused(tiny: Tiny) -> None:
    class Half:
        class_names = ("a",)

        def batches(self) -> None: ...

    with pytest.raises(DataError, match="Half is not a complete image source .* lacks concatenated, files, .*, with_labels"):
        as_source(Half(), tiny().data)


class Own:
    """A source of a caller's own kind."""

    def __init__(self, inner: MemorySource) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __len__(self) -> int:
        return len(self.inner)


def test_a_source_of_ones_own_is_learned_and_its_memory_saved(tiny: Tiny, synthetic: Images, tmp_path: Path) -> None:
    learner = Learner(tiny())
    learner.learn(Own(synthetic("ab")))
    learner.learn(Own(synthetic("cd")), Own(synthetic("abcd", seed=1)))
    back = Learner.load(learner.save(tmp_path))
    assert learner.model.memory is not None and back.model.memory is not None
    assert back.model.memory.fingerprint() == learner.model.memory.fingerprint()
    # Whatever holds the images, what is saved are their pixels.
    tensors, facts = record_of(Own(synthetic("ab")))
    assert from_record(tensors, facts, read_settings(tiny().data)).fingerprint() == synthetic("ab").fingerprint()
    assert back.predict(synthetic("abcd").images) == learner.predict(synthetic("abcd").images)


@pytest.mark.parametrize(
    ("changes", "stored"),
    [
        ({"data.image_size": 14}, (14, 14)),
        ({"data.image_size": 14, "data.random_resized_crop": True}, (16, 16)),
        ({"data.image_size": None}, (32, 32)),
        ({"data.image_size": None, "data.random_resized_crop": True}, (32, 32)),
    ],
)
def test_data_sets_are_stored_as_the_transforms_take_them(changes: dict[str, Any], stored: tuple[int, int], tiny: Tiny) -> None:
    config = tiny(changes).data
    source = as_source(Pictures([(20, 14), (9, 30)], [0, 1, 0, 1]), config)
    assert source.image_size == stored
    train, test = transforms_for(config, source.image_size)
    for transform in (train, test):
        (batch,) = source.batches(None, 8, transform=transform, generator=torch.Generator())
        assert batch.images.shape[2:] == train.size


def test_the_size_of_what_was_learned_wins(tiny: Tiny) -> None:
    assert as_source(Pictures([(20, 14)], [0, 1]), tiny({"data.image_size": 14}).data, (9, 9)).image_size == (9, 9)


def test_too_much_for_memory_is_refused(tiny: Tiny) -> None:
    with pytest.raises(DataError, match="max_gib"):
        as_source(Pictures([(64, 64)], [0] * 100), tiny({"data.max_gib": 1e-4, "data.image_size": 64}).data)


def test_empty_classes_are_counted_and_left_out(synthetic: Images) -> None:
    source = synthetic("abc", 2).subset(torch.tensor([0, 4, 5]))
    assert counts_by_class(source) == {"a": 1, "b": 0, "c": 2}
    left = without_empty_classes(source)
    assert left.class_names == ("a", "c")
    assert left.labels.tolist() == [0, 1, 1]
    assert without_empty_classes(left) is left


@pytest.mark.parametrize(
    ("chosen", "known", "joint", "words"),
    [
        ([], (), False, "0 training image"),
        ([0], (), False, "1 training image"),
        ([0, 1, 2, 3], (), False, "no training images of class 'c'"),
        (None, ("a", "x"), True, "all seen classes: 'x' missing"),
        (None, ("a", "b", "c"), True, "no new class"),
    ],
)
def test_training_images_that_cannot_be_learned(
    chosen: list[int] | None, known: tuple[str, ...], joint: bool, words: str, synthetic: Images
) -> None:
    source = synthetic("abc", 2)
    with pytest.raises(DataError, match=words):
        check_train(source if chosen is None else source.subset(torch.tensor(chosen, dtype=torch.int64)), known, None, joint=joint)


def test_images_of_another_size(synthetic: Images) -> None:
    with pytest.raises(DataError, match="8 × 8 pixels, but the model was trained on 6 × 6"):
        check_train(synthetic("ab"), (), (6, 6), joint=False)
    with pytest.raises(DataError, match="8 × 8 pixels, but the model was trained on 6 × 6"):
        check_test(synthetic("ab"), "ab", (6, 6))


def test_test_images_that_say_nothing(synthetic: Images) -> None:
    with pytest.raises(DataError, match="no images"):
        check_test(synthetic("ab").subset(torch.tensor([], dtype=torch.int64)), "ab", (8, 8))
    with pytest.raises(DataError, match="never learned: 'b'"):
        check_test(synthetic("ab"), "ac", (8, 8))


def test_a_learner_refuses_before_it_works(tiny: Tiny, synthetic: Images) -> None:
    learner = Learner(tiny())
    with pytest.raises(DataError, match="never learned: 'c'"):
        learner.learn(synthetic("ab"), synthetic("abc"))
    with pytest.raises(DataError, match="no images"):
        learner.learn(synthetic("ab"), synthetic("ab").subset(torch.tensor([], dtype=torch.int64)))
    with pytest.raises(DataError, match="no training images of class 'b'"):
        learner.learn(synthetic("ab", 4).subset(torch.arange(4)))
    assert learner.records == []
    learner.learn(synthetic("ab"))
    for wrong, words in (
        (synthetic("ab"), "'a' is already known, and these are"),
        (synthetic("cd", side=6), "6 × 6"),
        (synthetic("c", 1), "1 training"),
    ):
        with pytest.raises(DataError, match=words):
            learner.learn(wrong)
    with pytest.raises(DataError, match="6 × 6"):
        learner.evaluate(synthetic("ab", side=6))
    with pytest.raises(DataError, match="6 × 6"):
        learner.learn(synthetic("cd"), synthetic("abcd", side=6))
    assert learner.class_names == ("a", "b")


def test_labels_out_of_range() -> None:
    with pytest.raises(DataError, match="label 3 of image 1 is out of range"):
        MemorySource(torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.tensor([0, 3]), ["a", "b"])


def test_labels_out_of_range_in_a_data_set(tiny: Tiny) -> None:
    with pytest.raises(DataError, match="label 2 of image 1"):
        Learner(tiny()).learn(Pictures([(8, 8)], [0, 2], ["cat", "dog"]))


def test_a_test_set_may_name_classes_that_it_has_no_images_of(tiny: Tiny, synthetic: Images) -> None:
    learner = Learner(tiny())
    learner.learn(synthetic("ab"), synthetic("abz", 2).subset(torch.arange(4)))
    assert learner.evaluate(synthetic("zba", 2).subset(torch.arange(2, 6))).images == 4


def test_a_shard_is_not_trained_on(tiny: Tiny, synthetic: Images) -> None:
    with pytest.raises(DataError, match="one process trains a step"):
        Learner(tiny()).learn(synthetic("ab").sharded(0, 2))
