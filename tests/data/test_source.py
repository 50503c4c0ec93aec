"""`MemorySource`: what it refuses, and how its views and batches behave."""

from __future__ import annotations

import pytest
import torch

from der_fast.config.schema import DataConfig
from der_fast.data import MemorySource, transforms_for
from der_fast.data.read.place import BEGINNING, Place
from der_fast.errors import DataError

NAMES = ("ant", "bee", "cat")


def make(count=9, side=4, seed=0, names=NAMES):
    """Images whose first pixel is their number, labels 0 1 2 0 1 2 …"""
    images = torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    images[:, 0, 0, 0] = torch.arange(count)
    return MemorySource(images, torch.arange(count) % len(names), names, files=[f"f{index}" for index in range(count)])


def numbers(source):
    return source.images[:, 0, 0, 0].tolist()


def evaluation(source):
    return transforms_for(DataConfig(), source.image_size)[1]


def training(source):
    return transforms_for(DataConfig(crop_padding=1), source.image_size)[0]


def seeded(seed=7):
    return torch.Generator().manual_seed(seed)


def test_labels_of_any_integer_type_become_int64():
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64):
        source = MemorySource(torch.zeros(3, 2, 2, 3, dtype=torch.uint8), torch.tensor([0, 1, 2], dtype=dtype), NAMES)
        assert source.labels.dtype == torch.int64 and source.labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("images", "labels", "names", "message"),
    [
        (torch.zeros(2, 4, 4, 3), [0, 1], NAMES, "uint8, N × H × W × 3"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), [0, 1], NAMES, r"\(2, 3, 4, 4\)"),
        (torch.zeros(2, 0, 4, 3, dtype=torch.uint8), [0, 1], NAMES, r"\(2, 0, 4, 3\)"),
        (torch.zeros(2, 4, 4, 3, dtype=torch.uint8), [0, 3], NAMES, "label 3 of image 1 is out of range.* 0 … 2"),
        (torch.zeros(2, 4, 4, 3, dtype=torch.uint8), [-1, 0], NAMES, "label -1 of image 0"),
        (torch.zeros(2, 4, 4, 3, dtype=torch.uint8), [0], NAMES, "one integer per image"),
        (torch.zeros(2, 4, 4, 3, dtype=torch.uint8), [0.0, 1.0], NAMES, "one integer per image"),
        (torch.zeros(2, 4, 4, 3, dtype=torch.uint8), [0, 1], ("ant", "ant"), "'ant' appears more than once"),
    ],
)
def test_bad_input_is_refused(images, labels, names, message):
    with pytest.raises(DataError, match=message):
        MemorySource(images, torch.tensor(labels), names)


def test_a_wrong_label_names_the_file():
    with pytest.raises(DataError, match=r"label 9 of image 1 \(b\.png\)"):
        MemorySource(torch.zeros(2, 2, 2, 3, dtype=torch.uint8), torch.tensor([0, 9]), NAMES, files=["a.png", "b.png"])


def test_of_classes_keeps_images_and_renumbers_in_the_order_asked_for():
    part = make().of_classes(["cat", "ant"])
    assert part.class_names == ("cat", "ant")
    assert numbers(part) == [0, 2, 3, 5, 6, 8]
    assert part.labels.tolist() == [1, 0, 1, 0, 1, 0]
    assert part.files == ("f0", "f2", "f3", "f5", "f6", "f8")


@pytest.mark.parametrize(
    ("names", "message"),
    [(["dog"], "unknown class 'dog'; there are ant, bee, cat"), (["ant", "ant"], "'ant' appears more than once")],
)
def test_of_classes_refuses_unknown_and_repeated_names(names, message):
    with pytest.raises(DataError, match=message):
        make().of_classes(names)


def test_of_classes_refuses_a_class_without_images():
    source = make().relabelled((*NAMES, "dog"))
    with pytest.raises(DataError, match="no images of class 'dog'"):
        source.of_classes(["ant", "dog"])


def test_relabelled_needs_every_name():
    with pytest.raises(DataError, match="class 'bee' is not among"):
        make().relabelled(["cat", "ant"])


def test_concatenated_refuses_other_names_and_sizes():
    with pytest.raises(DataError, match=r"class names differ.*relabelled"):
        make().concatenated(make(names=("ant", "bee", "dog")))
    with pytest.raises(DataError, match=r"images of \(4, 4\) and of \(5, 5\)"):
        make().concatenated(make(side=5))


def test_concatenated_with_an_empty_source():
    source = make()
    empty = source.subset(torch.zeros(0, dtype=torch.int64))
    assert len(empty) == 0 and empty.image_size == (4, 4)
    assert empty.concatenated(source).fingerprint() == source.fingerprint()
    assert list(empty.batches(None, 4, transform=evaluation(source))) == []


def test_skipped_files_are_carried_along_once():
    source = MemorySource(torch.zeros(2, 2, 2, 3, dtype=torch.uint8), torch.tensor([0, 1]), ("a", "b"), skipped=["x.jpg: broken"])
    assert source.of_classes(["a"]).relabelled(("a", "b")).concatenated(source).skipped == ("x.jpg: broken",)


@pytest.mark.parametrize("indices", [torch.tensor([0, 9]), torch.tensor([-1]), torch.tensor([0.0]), torch.tensor([[0]]), torch.ones(9) > 0])
def test_wrong_indices_are_refused(indices):
    source = make()
    with pytest.raises(DataError, match=r"ind(ex|ices)"):
        source.subset(indices)
    with pytest.raises(DataError, match=r"ind(ex|ices)"):
        source.batches(indices, 2, transform=evaluation(source))


def test_batches_in_order():
    source = make()
    batches = list(source.batches(None, 4, transform=evaluation(source)))
    assert [len(batch.labels) for batch in batches] == [4, 4, 1]
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(9))
    assert torch.equal(torch.cat([batch.labels for batch in batches]), source.labels)
    assert torch.equal(torch.cat([batch.images for batch in batches]), evaluation(source)(source.images))
    assert all(batch.images.is_contiguous(memory_format=torch.channels_last) for batch in batches)
    assert all(batch.labels.dtype == batch.indices.dtype == torch.int64 for batch in batches)


def test_batches_of_chosen_images_repeat_what_is_repeated():
    source = make()
    (batch,) = source.batches(torch.tensor([5, 0, 5]), 8, transform=evaluation(source))
    assert batch.indices.tolist() == [5, 0, 5] and batch.labels.tolist() == [2, 0, 2]
    assert torch.equal(batch.images[0], batch.images[2])


def test_equal_seeds_give_equal_batches_bit_for_bit():
    source = make()

    def run(seed):
        return list(source.batches(None, 4, transform=training(source), generator=seeded(seed), shuffle=True))

    first, again, other = run(1), run(1), run(2)
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one.images, two.images) and torch.equal(one.labels, two.labels) and torch.equal(one.indices, two.indices)
    assert any(not torch.equal(one.images, two.images) for one, two in zip(first, other, strict=True))


@pytest.mark.parametrize("photos", [False, True])
def test_what_an_image_becomes_does_not_depend_on_its_batch(photos):
    source = make(side=9)
    config = DataConfig(random_resized_crop=True, image_size=8) if photos else DataConfig(crop_padding=1)
    transform = transforms_for(config, source.image_size)[0]

    def run(batch_size, indices=None):
        batches = source.batches(indices, batch_size, transform=transform, generator=seeded(), shuffle=indices is None)
        return {int(index): image for batch in batches for index, image in zip(batch.indices, batch.images, strict=True)}

    whole = run(4)
    for other in (run(1), run(9)):
        assert len(set(whole) & set(other)) >= 8
        assert all(torch.equal(whole[index], image) for index, image in other.items() if index in whole)


@pytest.mark.parametrize("photos", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_a_pass_goes_on_from_the_place_that_a_batch_names(photos, train):
    source = make(side=9)
    config = DataConfig(random_resized_crop=True, image_size=8) if photos else DataConfig(crop_padding=1)
    transform = transforms_for(config, source.image_size)[0 if train else 1]

    def run(start=BEGINNING):
        return list(source.batches(None, 2, transform=transform, generator=seeded(), shuffle=train, start=start))

    whole = run()
    assert [batch.place for batch in whole] == [Place(number) for number in range(1, len(whole) + 1)] and len(whole) == (4 if train else 5)
    for number, batch in enumerate(whole, 1):
        rest = run(batch.place)
        assert len(rest) == len(whole) - number
        for one, other in zip(rest, whole[number:], strict=True):
            assert torch.equal(one.images, other.images) and torch.equal(one.indices, other.indices) and one.place == other.place


def test_shuffled_batches_keep_images_and_labels_together():
    source = make()
    for batch in source.batches(None, 4, transform=evaluation(source), generator=seeded(), shuffle=True):
        assert torch.equal(batch.images, evaluation(source)(source.images[batch.indices]))
        assert torch.equal(batch.labels, source.labels[batch.indices])


def test_training_drops_a_last_batch_of_one_image_but_not_an_only_one():
    source = make()
    sizes = [len(batch.labels) for batch in source.batches(None, 4, transform=evaluation(source), generator=seeded(), shuffle=True)]
    assert sizes == [4, 4]
    alone = torch.tensor([3])
    sizes = [len(batch.labels) for batch in source.batches(alone, 4, transform=evaluation(source), generator=seeded(), shuffle=True)]
    assert sizes == [1]
    sizes = [
        len(batch.labels) for batch in source.batches(torch.arange(3), 1, transform=evaluation(source), generator=seeded(), shuffle=True)
    ]
    assert sizes == [1, 1, 1]


def test_batches_refuse_what_cannot_be_repeated():
    source = make()
    with pytest.raises(ValueError, match=r"torch\.Generator"):
        source.batches(None, 4, transform=evaluation(source), shuffle=True)
    with pytest.raises(ValueError, match=r"torch\.Generator"):
        next(iter(source.batches(None, 4, transform=training(source))))
    with pytest.raises(ValueError, match="batch_size"):
        source.batches(None, 0, transform=evaluation(source))


def test_fingerprint_sees_every_pixel_label_and_name():
    source = make()
    same = MemorySource(source.images.clone(), source.labels.clone(), NAMES)
    assert same.fingerprint() == source.fingerprint() == source.fingerprint()
    pixels = source.images.clone()
    pixels[8, 3, 3, 2] ^= 1
    labels = source.labels.clone()
    labels[8] = 0
    others = [
        MemorySource(pixels, source.labels, NAMES),
        MemorySource(source.images, labels, NAMES),
        MemorySource(source.images, source.labels, ("ant", "bee", "cow")),
        MemorySource(source.images.view(9, 2, 8, 3), source.labels, NAMES),
        source.subset(torch.arange(8)),
        source.subset(torch.arange(8, -1, -1)),
    ]
    assert len({other.fingerprint() for other in [source, *others]}) == 7
