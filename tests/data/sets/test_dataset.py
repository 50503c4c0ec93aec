"""`from_dataset`: any map-style data set of pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from der_fast.data import from_dataset
from der_fast.errors import DataError


class Pairs:
    """A data set of given images and labels."""

    def __init__(self, images, labels, classes=None):
        self.images, self.labels = images, labels
        if classes is not None:
            self.classes = classes

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.images[index], self.labels[index]


def pixels(count=4, height=5, width=6, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def test_every_kind_of_image_gives_the_same_source():
    raw = pixels()
    kinds = [
        [Image.fromarray(entry) for entry in raw],
        list(raw),
        [torch.from_numpy(entry.transpose(2, 0, 1).copy()) for entry in raw],
        [torch.from_numpy(entry.transpose(2, 0, 1) / np.float32(255)) for entry in raw],
    ]
    prints = {from_dataset(Pairs(images, [0, 1, 1, 0], ["a", "b"])).fingerprint() for images in kinds}
    assert len(prints) == 1
    source = from_dataset(Pairs(kinds[0], [0, 1, 1, 0], ["a", "b"]))
    assert np.array_equal(source.images.numpy(), raw) and source.image_size == (5, 6)


def test_a_torch_dataset():
    images = torch.from_numpy(pixels().transpose(0, 3, 1, 2).copy())
    source = from_dataset(torch.utils.data.TensorDataset(images, torch.tensor([3, 1, 1, 3])))
    assert source.class_names == ("1", "3") and source.labels.tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize("labels", [[2, 0, 0, 2], list(np.array([2, 0, 0, 2])), list(torch.tensor([2, 0, 0, 2])), [np.array(2), 0, 0, 2]])
def test_integer_labels_of_every_type(labels):
    assert from_dataset(Pairs(list(pixels()), labels)).labels.tolist() == [1, 0, 0, 1]
    named = from_dataset(Pairs(list(pixels()), labels), class_names=["x", "y", "z"])
    assert named.labels.tolist() == [2, 0, 0, 2] and named.class_names == ("x", "y", "z")


def test_given_names_win_over_the_data_sets_own():
    source = from_dataset(Pairs(list(pixels()), [0, 1, 1, 0], ["a", "b"]), class_names=("u", "v"))
    assert source.class_names == ("u", "v")


def test_texts_as_labels():
    assert from_dataset(Pairs(list(pixels()), ["dog", "cat", "cat", "dog"])).class_names == ("cat", "dog")
    source = from_dataset(Pairs(list(pixels()), ["dog", "cat", "cat", "dog"]), class_names=["dog", "emu", "cat"])
    assert source.labels.tolist() == [0, 2, 2, 0]


class Wrapper:
    """A data set of one's own around another."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return self.dataset[index]


def wrapped():
    whole = Pairs(list(pixels(8)), [2, 1, 2, 1, 2, 1, 2, 1], ["cat", "dog", "emu"])
    first, second = torch.utils.data.random_split(whole, [5, 3], generator=torch.Generator().manual_seed(1))
    yield "random_split", first
    yield "a subset of a subset", torch.utils.data.Subset(first, [0, 1, 4])
    yield "put together", torch.utils.data.ConcatDataset([first, second])
    yield "nested", Wrapper(torch.utils.data.ConcatDataset([Wrapper(first), torch.utils.data.Subset(second, [2])]))


@pytest.mark.parametrize(("what", "dataset"), [pytest.param(what, dataset, id=what) for what, dataset in wrapped()])
def test_wrappers_keep_the_class_names(what, dataset):
    source = from_dataset(dataset)
    assert source.class_names == ("cat", "dog", "emu")
    assert source.labels.tolist() == [dataset[index][1] for index in range(len(dataset))]


def test_a_wrapper_in_a_circle_and_one_without_names_are_no_trouble():
    knot = Wrapper(Pairs(list(pixels()), [0, 1, 1, 0]))
    assert from_dataset(knot).class_names == ("0", "1")
    names = Pairs(list(pixels()), [0, 1, 1, 0])
    names.dataset = names
    assert from_dataset(names).class_names == ("0", "1")


def test_data_sets_that_call_their_classes_differently_are_not_put_together():
    both = torch.utils.data.ConcatDataset([Pairs(list(pixels()), [0, 1, 1, 0], names) for names in (["cat", "dog"], ["dog", "cat"])])
    with pytest.raises(DataError, match=r"name their classes differently \(cat, dog; dog, cat\)"):
        from_dataset(both)
    assert from_dataset(both, class_names=["cat", "dog"]).class_names == ("cat", "dog")


def test_a_name_is_one_whatever_bytes_stand_for_it():
    one, other = "caf\u00e9", "cafe\u0301"
    source = from_dataset(Pairs(list(pixels()), [one, other, "tea", other]))
    assert source.class_names == (one, "tea") and source.labels.tolist() == [0, 0, 1, 0]
    named = from_dataset(Pairs(list(pixels()), [other, one, "tea", one]), class_names=[other, "tea"])
    assert named.class_names == (one, "tea") and named.labels.tolist() == [0, 0, 1, 0]
    assert len(named.of_classes([other])) == len(named.of_classes([one])) == 3
    assert named.relabelled(["tea", other]).labels.tolist() == [1, 1, 0, 1]


def test_mixed_sizes_become_square():
    mixed = [pixels(1, 5, 6)[0], pixels(1, 30, 8)[0], pixels(1, 32, 32)[0]]
    assert from_dataset(Pairs(mixed, [0, 1, 1])).image_size == (32, 32)
    assert from_dataset(Pairs([*mixed, pixels(1, 33, 8)[0]], [0, 1, 1, 0])).image_size == (224, 224)
    assert from_dataset(Pairs(mixed, [0, 1, 1]), image_size=16).image_size == (16, 16)
    assert from_dataset(Pairs(mixed, [0, 1, 1]), image_size=(16, 20)).image_size == (16, 20)


@pytest.mark.parametrize(
    ("dataset", "keys", "message"),
    [
        (iter([]), {}, "is not a map-style data set"),
        (Pairs([], []), {}, "is empty"),
        (Pairs(list(pixels()), [0, 1, 2, 0], ["a", "b"]), {}, r"label 2 of image 2 is out of range.* 0 … 1"),
        (Pairs(list(pixels()), [0, -1, 0, 0]), {}, "label -1 of image 1 is negative"),
        (Pairs(list(pixels()), [0, -1, 0, 0], ["a"]), {}, "label -1 of image 1 is out of range"),
        (Pairs(list(pixels()), [0, 0.5, 0, 0]), {}, r"label 0\.5 of image 1 is a float"),
        (Pairs(list(pixels()), [0, None, 0, 0]), {}, "label None of image 1"),
        (Pairs(list(pixels()), ["a", "b", "z", "a"]), {"class_names": ["a", "b"]}, "label 'z' of image 2"),
        (Pairs(list(pixels()), ["a", 1, "z", "a"]), {}, "label 'a' of image 0 is a str"),
        (Pairs([*pixels(3), None], [0, 0, 0, 0]), {}, "image 3 is a NoneType"),
        (Pairs([torch.randn(3, 8, 9)], [0]), {}, r"image 0 has shape \(3, 8, 9\) and floating values.*before any normalisation"),
        (Pairs(list(pixels(2)), [0, 0, 0]), {}, r"dataset\[2\] failed: IndexError"),
        ([(1, 2, 3)], {}, r"dataset\[0\] must be a pair"),
        (Pairs(list(pixels()), [0, 1, 0, 1]), {"image_size": 400, "max_gib": 0.001}, "4 images of 400 × 400"),
        (Pairs(list(pixels()), [0, 1, 0, 1]), {"max_gib": 1e-7}, "the first 2 of 4 images"),
        (Pairs(list(pixels()), [0, 1, 0, 1], ["a", "a"]), {}, "'a' appears more than once"),
    ],
)
def test_bad_data_sets_are_refused(dataset, keys, message):
    with pytest.raises(DataError, match=message):
        from_dataset(dataset, **keys)
