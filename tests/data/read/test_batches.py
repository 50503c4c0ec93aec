"""Passes over image files in batches, with every reader: the same seed gives the same images, wherever a pass starts."""

from __future__ import annotations

import sys
import threading
import time

import numpy as np
import pytest
import torch

from der_fast.data.io import members
from der_fast.data.read.place import Place
from der_fast.errors import DataError
from der_fast.seeds import generator


def epoch(source, transform, number=0, batch=4, **keywords):
    return list(source.batches(None, batch, transform=transform, generator=generator(1, number), shuffle=True, **keywords))


def same(one, other):
    return len(one) == len(other) and all(
        torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and torch.equal(a.indices, b.indices)
        for a, b in zip(one, other, strict=True)
    )


def by_index(batches):
    return {int(index): image for batch in batches for index, image in zip(batch.indices, batch.images, strict=True)}


def test_the_same_seed_gives_the_same_batches_bit_for_bit(photos, open_photos, reader):
    train, _, transform, _ = open_photos(photos, reader)
    first = epoch(train, transform)
    assert [len(batch.indices) for batch in first] == [4] * 5 and len({*torch.cat([batch.indices for batch in first]).tolist()}) == 20
    assert same(first, epoch(train, transform))
    assert same(first, epoch(open_photos(photos, reader, workers=1)[0], transform))
    other = epoch(train, transform, 1)
    assert [batch.indices.tolist() for batch in other] != [batch.indices.tolist() for batch in first]
    one, two = by_index(first), by_index(other)
    assert not any(torch.equal(one[index], two[index]) for index in one.keys() & two.keys())


def test_an_epoch_goes_on_in_its_middle(photos, open_photos, reader):
    train, _, transform, _ = open_photos(photos, reader)
    whole = epoch(train, transform)
    for start in range(len(whole) + 2):
        assert same(whole[start:], epoch(open_photos(photos, reader)[0], transform, start=Place(start)))


def test_a_pass_goes_on_from_the_place_that_a_batch_names_whatever_could_not_be_read(photos, open_photos, reader):
    for name in ("ape/1", "bee/0", "cow/6"):
        (photos / "train" / f"{name}.jpg").write_bytes(b"no image")
    train, _, transform, _ = open_photos(photos, reader)
    whole = epoch(train, transform, batch=2)
    behind = {batch.place.batches: batch.place.faults for batch in whole}
    # Batches of which less than two images were left are not given; those behind them still have the numbers of the pass.
    assert len(whole) == 8 and len(set(range(1, 11)) - set(behind)) == 2
    assert list(behind.values()) == sorted(behind.values()) and behind[max(behind)] == len(train.skipped) == 2
    for number, batch in enumerate(whole, 1):
        rest = epoch(open_photos(photos, reader)[0], transform, batch=2, start=batch.place)
        assert same(rest, whole[number:]) and [one.place for one in rest] == [other.place for other in whole[number:]]


def test_an_image_is_cut_alike_in_batches_of_any_size(photos, open_photos, reader):
    train, _, transform, _ = open_photos(photos, reader)
    few, many = by_index(epoch(train, transform, batch=3)), by_index(epoch(train, transform, batch=16))
    assert few.keys() == many.keys() and all(torch.equal(few[index], many[index]) for index in few)


def test_readers_cut_mirror_and_jitter_alike(photos, open_photos):
    pytest.importorskip("nvidia.dali", reason="needs nvidia-dali (the extra 'dali'), which has no package for this system or Python")
    for jitter in (0.0, 0.4):
        batches = {}
        for name in ("dali", "pillow"):
            train, _, transform, _ = open_photos(photos, name, brightness=jitter)
            batches[name] = epoch(train, transform)
        for one, other in zip(batches["dali"], batches["pillow"], strict=True):
            assert torch.equal(one.indices, other.indices) and torch.equal(one.labels, other.labels)
            # One grey level is 0.015 of these; a crop or a mirror image of another part differs by 0.5 and more.
            assert (one.images - other.images).abs().mean() < 0.02


@pytest.mark.parametrize("jitter", [0.0, 0.4])
def test_types_of_the_result(photos, open_photos, reader, jitter):
    train, _, transform, _ = open_photos(photos, reader, brightness=jitter)
    wanted = by_index(epoch(train, transform))
    mean, std = torch.tensor(transform.mean)[:, None, None], torch.tensor(transform.std)[:, None, None]
    for dtype, error in ((torch.float16, 2e-3), (torch.bfloat16, 2e-2)):
        for index, image in by_index(epoch(train, transform, dtype=dtype)).items():
            assert image.dtype == dtype and (image.float() - wanted[index]).abs().max() < error
    for index, image in by_index(epoch(train, transform, dtype=torch.uint8)).items():
        assert image.dtype == torch.uint8 and image.stride()[0] == 1
        # Before rounding to whole grey levels.
        assert ((image / 255 - mean) / std - wanted[index]).abs().max() < 0.6 / 255 / 0.25


def test_memory_layouts(photos, open_photos, reader):
    train, _, transform, _ = open_photos(photos, reader)
    planes = epoch(train, transform, channels_last=False)
    assert all(batch.images.is_contiguous() for batch in planes)
    assert all(torch.equal(one.images, other.images) for one, other in zip(planes, epoch(train, transform), strict=True))


def test_shards_read_different_images_in_equally_many_batches(photos, open_photos, reader):
    train, test, transform, _ = open_photos(photos, reader)
    both = train.concatenated(test)
    parts = [epoch(both.sharded(rank, 2), transform) for rank in (0, 1)]
    assert [len(batch.indices) for batch in parts[0]] == [len(batch.indices) for batch in parts[1]] == [4, 4, 4, 3]
    read = [[index for batch in part for index in batch.indices.tolist()] for part in parts]
    assert sorted(read[0] + read[1]) == list(range(30))
    assert {sum(index >= 21 for index in part) for part in read} <= {4, 5}
    whole = by_index(epoch(both, transform))
    assert all(torch.equal(image, whole[index]) for part in parts for index, image in by_index(part).items())


def test_a_last_batch_of_one_image_is_left_out_in_training_only(photos, open_photos, reader):
    train, _, transform, test_transform = open_photos(photos, reader)
    assert [len(batch.indices) for batch in epoch(train, transform, batch=5)] == [5, 5, 5, 5]
    assert [len(batch.indices) for batch in train.batches(None, 5, transform=test_transform)] == [5, 5, 5, 5, 1]
    assert [len(batch.indices) for batch in epoch(train.subset(torch.tensor([4])), transform)] == [1]


def test_a_pass_may_be_left_and_two_may_run_at_a_time(photos, open_photos, reader):
    train, test, transform, test_transform = open_photos(photos, reader)
    wanted, tested = epoch(train, transform), list(test.batches(None, 2, transform=test_transform))
    for _ in range(3):
        next(iter(train.batches(None, 4, transform=transform, generator=generator(1, 9), shuffle=True)))
    pairs = zip(
        train.batches(None, 4, transform=transform, generator=generator(1, 0), shuffle=True),
        train.batches(None, 4, transform=transform, generator=generator(1, 0), shuffle=True),
        test.batches(None, 2, transform=test_transform),
        strict=False,
    )
    for number, (one, other, third) in enumerate(pairs):
        assert torch.equal(one.images, wanted[number].images) and torch.equal(other.images, wanted[number].images)
        assert torch.equal(third.images, tested[number].images)
    assert same(wanted, epoch(train, transform))
    assert sum("der_fast-dali" in thread.name for thread in threading.enumerate()) == 0


def test_worker_processes_give_the_same(photos, open_photos):
    train, _, transform, _ = open_photos(photos, "pillow")
    assert same(epoch(train, transform), epoch(open_photos(photos, "pillow", workers=2)[0], transform))


def test_a_drive_that_does_not_answer_ends_in_an_error(photos, open_photos, monkeypatch):
    """With DALI; Pillow's processes know nothing of this slow drive, test_processes.py stops them."""
    pytest.importorskip("nvidia.dali", reason="needs nvidia-dali (the extra 'dali'), which has no package for this system or Python")
    read = members.read_bytes

    def slow(path):
        if path.endswith("3.jpg"):
            time.sleep(1.5)
        return read(path)

    monkeypatch.setattr("der_fast.data.decode.encoded.read_bytes", slow)
    train, _, transform, _ = open_photos(photos, "dali", timeout=0.4, workers=1)
    with pytest.raises(DataError, match=r"data\.timeout"):
        epoch(train, transform)


def test_what_decodes_is_said_once(photos, open_photos, reader):
    train, test, transform, test_transform = open_photos(photos, reader)
    for _ in range(2):
        epoch(train, transform)
        list(test.batches(None, 4, transform=test_transform))
    assert [("nvidia-dali" in note) for note in train.notes] == [False, True]
    assert ("with nvidia-dali" in train.notes[1]) == (reader == "pillow")


def test_without_dali_pillow_reads_the_same_folders_and_says_so(photos, open_photos, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    train, _, transform, _ = open_photos(photos, "auto", workers=0)
    assert same(epoch(train, transform), epoch(open_photos(photos, "pillow")[0], transform))
    assert train.notes[1:] == ("images are decoded by Pillow in this process; with nvidia-dali (der_fast[dali]) it is faster",)
    asked, _, transform, _ = open_photos(photos, "dali")
    with pytest.raises(DataError, match=r"which is not installed: pip install 'der_fast\[dali\]'"):
        epoch(asked, transform)


def test_a_dali_that_does_not_load_is_named(photos, open_photos, monkeypatch):
    monkeypatch.setattr("der_fast.data.read.dali.is_installed", lambda: True)
    monkeypatch.setitem(sys.modules, "der_fast.data.read.dali.reader", None)
    train, _, transform, _ = open_photos(photos, "dali")
    with pytest.raises(DataError, match=r"does not load: .*data\.reader='pillow'"):
        epoch(train, transform)


def test_a_pipeline_that_was_given_back_is_let_alone(photos, open_photos, monkeypatch):
    """Whoever takes it may have begun before the walk that gave it back has ended."""
    pytest.importorskip("nvidia.dali", reason="needs nvidia-dali (the extra 'dali'), which has no package for this system or Python")
    from der_fast.data.read.dali.reader import DaliReader

    give_back, walks = DaliReader._give_back, []

    def taken_at_once(self, form, pipeline, feed):
        give_back(self, form, pipeline, feed)
        walks.append((feed, wanted := iter(("of the next walk",))))
        feed.reading = wanted

    monkeypatch.setattr(DaliReader, "_give_back", taken_at_once)
    train, _, transform, _ = open_photos(photos, "dali")
    for number in range(3):
        epoch(train, transform, number)
        assert len(walks) == number + 1 and all(feed.reading is wanted for feed, wanted in walks[-1:])


def test_nothing_of_a_walk_that_was_left_comes_in_the_next(photos, open_photos):
    """A pass over files that DALI refuses is left while it sorts them out; others read the same pipeline afterwards."""
    pytest.importorskip("nvidia.dali", reason="needs nvidia-dali (the extra 'dali'), which has no package for this system or Python")
    from der_fast.data.read.dali.reader import Feed, Prepared

    train, _, transform, _ = open_photos(photos, "dali")
    feed = Feed()
    for left in (feed.fed, feed.again):
        left.append(Prepared(0, np.arange(2), [], []))
    feed.stopped = True
    feed.begin(None, 1.0, iter(()))
    assert not (feed.fed or feed.again or feed.stopped)
    wanted = epoch(train, transform)
    data = (photos / "train" / "ape" / "1.jpg").read_bytes()
    (photos / "train" / "ape" / "1.jpg").write_bytes(data[: len(data) // 2] + b"\xff\xd9")
    for _ in range(4):
        next(iter(train.batches(None, 4, transform=transform, generator=generator(1, 0), shuffle=True)))
    (photos / "train" / "ape" / "1.jpg").write_bytes(data)
    found = epoch(train, transform)
    assert [batch.indices.tolist() for batch in found] == [batch.indices.tolist() for batch in wanted]


def test_a_reader_that_loses_images_is_found_out(photos, open_photos, reader):
    train, _, transform, _ = open_photos(photos, reader)
    whole = train.library.reader()

    class Losing:
        name = "losing"

        def read(self, walk):
            yield from list(whole.read(walk))[:-1]

        def close(self):
            whole.close()

    train.library._reader = Losing()
    with pytest.raises(DataError, match="4 of 20 images were neither read nor refused"):
        epoch(train, transform)
