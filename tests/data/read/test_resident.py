"""The resident cache: decoded once, cropped from memory ever after."""

from __future__ import annotations

import pytest
import torch

from der_fast.data.io import members
from der_fast.data.read import resident
from der_fast.data.read.place import Place
from der_fast.seeds import generator


def epoch(source, transform, number=0, **keywords):
    return list(source.batches(None, 4, transform=transform, generator=generator(1, number), shuffle=True, **keywords))


@pytest.fixture
def reads(monkeypatch):
    """Names of the files read since."""
    seen = []

    def read(path):
        seen.append(path)
        return members.read_bytes(path)

    monkeypatch.setattr(resident, "read_bytes", read)
    return seen


@pytest.mark.parametrize("jitter", [0.0, 0.3])
def test_it_gives_the_same_crops_and_reads_every_file_once(photos, open_photos, reads, jitter):
    train, test, transform, test_transform = open_photos(photos, "pillow", cache_gib=1.0, workers=2, brightness=jitter)
    plain, plain_test, *_ = open_photos(photos, "pillow", brightness=jitter)
    for number in (0, 1):
        for one, other in zip(epoch(train, transform, number), epoch(plain, transform, number), strict=True):
            assert torch.equal(one.indices, other.indices) and one.images.is_contiguous(memory_format=torch.channels_last)
            # Windows are drawn in the pixels of the smaller images, so their edges differ by up to one of those.
            assert (one.images - other.images).abs().mean() < 0.15
    for one, other in zip(
        test.batches(None, 4, transform=test_transform), plain_test.batches(None, 4, transform=test_transform), strict=True
    ):
        assert torch.equal(one.indices, other.indices) and (one.images - other.images).abs().mean() < 0.05
    # Of the training images one is left over from five batches of four: which one, the epoch decides.
    assert len(reads) == len(set(reads)) and 29 <= len(reads) <= 30
    assert any("resident cache" in note and "decoded once" in note for note in train.notes)


def test_it_repeats_itself_bit_for_bit(photos, open_photos):
    train, _, transform, _ = open_photos(photos, "pillow", cache_gib=1.0, workers=2)
    other, *_ = open_photos(photos, "pillow", cache_gib=1.0, workers=1)
    for start in (0, 3):
        first, again = epoch(train, transform)[start:], epoch(other, transform, start=Place(start))
        assert len(first) == len(again) and all(torch.equal(a.images, b.images) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("jitter", [0.0, 0.4])
def test_types(photos, open_photos, jitter):
    train, _, transform, _ = open_photos(photos, "pillow", cache_gib=1.0, brightness=jitter)
    wanted = epoch(train, transform)
    for dtype, error in ((torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
        for one, other in zip(epoch(train, transform, dtype=dtype), wanted, strict=True):
            assert one.images.dtype == dtype and (one.images.float() - other.images).abs().max() < error
    mean, std = torch.tensor(transform.mean)[:, None, None], torch.tensor(transform.std)[:, None, None]
    for one, other in zip(epoch(train, transform, dtype=torch.uint8), wanted, strict=True):
        # Jittered, they are rounded to whole grey levels.
        assert ((one.images / 255 - mean) / std - other.images).abs().max() < (0.6 / 255 / 0.25 if jitter else 1e-5)


def test_what_does_not_fit_is_decoded_every_time(photos, open_photos):
    plain, _, transform, _ = open_photos(photos, "pillow")
    wanted = epoch(plain, transform)
    # Nothing fits; then so much that the first guess is right and the images are larger than it.
    for budget in (1e-6, 21 * 3 * 55 * 55 * 4 / 3 / 2**30):
        train, *_ = open_photos(photos, "pillow", cache_gib=budget)
        for _ in range(2):
            assert all(torch.equal(a.images, b.images) for a, b in zip(epoch(train, transform), wanted, strict=True))
        assert sum("do not fit" in note for note in train.notes) == 1
        assert next(iter(train.library._resident.values())).used == 0


def test_images_that_are_no_longer_asked_for_make_room(photos, open_photos):
    train, _, _, test_transform = open_photos(photos, "pillow", cache_gib=8 * 3 * 55 * 100 / 2**30)
    for name in ("ape", "bee", "cow"):
        part = train.of_classes([name])
        assert sum(len(batch.indices) for batch in part.batches(None, 4, transform=test_transform)) == 7
    assert not any("do not fit" in note for note in train.notes)


def test_broken_files_are_left_out_and_counted(photos, open_photos):
    (photos / "val" / "bee" / "1.jpg").write_bytes(b"")
    _, test, _, transform = open_photos(photos, "pillow", cache_gib=1.0)
    for _ in range(2):
        read = torch.cat([batch.indices for batch in test.batches(None, 4, transform=transform)])
        assert read.tolist() == [0, 1, 2, 3, 5, 6, 7, 8]
    assert test.skipped == (f"{photos}/val/bee/1.jpg: the file is empty",)


def test_there_is_none_on_the_cpu_unless_asked_for(photos, open_photos):
    train, _, transform, _ = open_photos(photos, "pillow")
    epoch(train, transform)
    assert list(train.library._resident.values()) == [None]


@pytest.mark.gpu
def test_on_a_gpu_it_is_made_by_itself(photos, open_photos):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    train, _, transform, _ = open_photos(photos, "pillow")
    wanted = epoch(open_photos(photos, "pillow", cache_gib=1.0)[0], transform)
    for one, other in zip(epoch(train, transform, device="cuda"), wanted, strict=True):
        assert one.images.device.type == "cuda" and (one.images.cpu() - other.images).abs().mean() < 0.02
    assert any("resident cache" in note for note in train.notes)
