"""Laws that hold for every `MemorySource`, whatever its images and labels."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from der_fast.config.schema import DataConfig
from der_fast.data import MemorySource, transforms_for

few = settings(max_examples=40, deadline=None)


@st.composite
def sources(draw, smallest=0):
    """A source whose images each carry their own number and label in their first pixel."""
    classes = draw(st.integers(1, 5))
    labels = draw(st.lists(st.integers(0, classes - 1), min_size=max(smallest, 0), max_size=20))
    height, width = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    images = torch.zeros(len(labels), height, width, 3, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(len(labels))
    images[:, 0, 0, 1] = torch.tensor(labels, dtype=torch.uint8)
    return MemorySource(images, torch.tensor(labels, dtype=torch.int64), [f"c{label}" for label in range(classes)])


def named(source):
    """(number of the image, its class name), in order: what no re-indexing may change."""
    numbers = source.images[:, 0, 0, 0].tolist()
    return [(number, source.class_names[label]) for number, label in zip(numbers, source.labels.tolist(), strict=True)]


@few
@given(source=sources(), data=st.data())
def test_of_classes_selects_exactly_the_images_of_those_classes(source, data):
    present = sorted({name for _, name in named(source)})
    names = data.draw(st.permutations(present).flatmap(lambda order: st.integers(0, len(order)).map(lambda count: order[:count])))
    part = source.of_classes(names)
    assert part.class_names == tuple(names)
    assert named(part) == [entry for entry in named(source) if entry[1] in names]
    assert all(f"c{int(pixel)}" == name for pixel, (_, name) in zip(part.images[:, 0, 0, 1], named(part), strict=True))


@few
@given(source=sources(), extra=st.integers(0, 3), data=st.data())
def test_relabelled_changes_numbers_but_no_names(source, extra, data):
    names = data.draw(st.permutations([*source.class_names, *(f"new{index}" for index in range(extra))]))
    other = source.relabelled(names)
    assert other.class_names == tuple(names)
    assert named(other) == named(source)
    assert other.labels.dtype == torch.int64
    if extra == 0:
        assert other.relabelled(source.class_names).fingerprint() == source.fingerprint()


@few
@given(source=sources(smallest=1), data=st.data())
def test_subset_takes_images_in_the_order_given(source, data):
    indices = data.draw(st.lists(st.integers(0, len(source) - 1), max_size=25))
    part = source.subset(torch.tensor(indices, dtype=torch.int64))
    assert named(part) == [named(source)[index] for index in indices]
    assert part.class_names == source.class_names and part.image_size == source.image_size


@few
@given(source=sources(), cut=st.integers(0, 20))
def test_concatenated_undoes_a_cut(source, cut):
    cut = min(cut, len(source))
    first, second = source.subset(torch.arange(cut)), source.subset(torch.arange(cut, len(source)))
    whole = first.concatenated(second)
    assert named(whole) == named(source)
    assert whole.fingerprint() == source.fingerprint()


@few
@given(source=sources(), batch_size=st.integers(1, 8), seed=st.integers(0, 2**40), shuffle=st.booleans(), train=st.booleans())
def test_batches_cover_every_image_once_and_repeat_themselves(source, batch_size, seed, shuffle, train):
    transform = transforms_for(DataConfig(crop_padding=2), source.image_size)[0 if train else 1]

    def run():
        generator = torch.Generator().manual_seed(seed)
        return list(source.batches(None, batch_size, transform=transform, generator=generator, shuffle=shuffle))

    batches, again = run(), run()
    assert all(
        torch.equal(one.images, two.images) and torch.equal(one.indices, two.indices) for one, two in zip(batches, again, strict=True)
    )
    seen = [index for batch in batches for index in batch.indices.tolist()]
    assert len(set(seen)) == len(seen)
    dropped = shuffle and len(source) > batch_size and len(source) % batch_size == 1
    assert len(seen) == len(source) - dropped
    for batch in batches:
        assert 1 <= len(batch.labels) <= batch_size
        assert torch.equal(batch.labels, source.labels[batch.indices])
        assert batch.images.shape == (len(batch.labels), 3, *source.image_size)
