"""Small images on a GPU: what goes there, and what is said where they do not fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from der_fast.config.schema import DataConfig
from der_fast.data import MemorySource, resident, transforms_for
from der_fast.data.augment.transform import Transform
from der_fast.data.resident import on_device

CPU = torch.device("cpu")


def source_of(count: int = 6) -> MemorySource:
    pixels = torch.randint(0, 256, (count, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return MemorySource(pixels, torch.arange(count) % 2, "ab")


def transform(**changes: object) -> Transform:
    return transforms_for(DataConfig(**changes), (8, 8))[0]  # type: ignore[arg-type]


def test_images_that_fit_lie_on_the_device_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident, "free_bytes", lambda device: 10**6)
    source = source_of()
    images = on_device(source, transform(), CPU, torch.bfloat16, pytest.fail, channels_last=True)
    assert images is not None and images.backend == "fused" and images.dtype == torch.bfloat16
    assert images.pixels.dtype == torch.uint8 and torch.equal(images.pixels, source.images)
    assert torch.equal(images.labels, source.labels)


def test_a_gpu_with_too_little_memory_gets_them_batch_by_batch_and_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(resident, "free_bytes", lambda device: 6 * 8 * 8 * 3 * 4 - 4)
    assert on_device(source_of(), transform(), CPU, torch.float32, said.append, channels_last=True) is None
    assert said == [
        "6 images (1.07e-06 GiB) go to the GPU batch by batch: only 4.29e-06 GiB of its memory is free, and training needs most of that"
    ]


def test_an_allocation_that_fails_all_the_same_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(resident, "free_bytes", lambda device: 10**6)

    def full(self: torch.Tensor, *arguments: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    source, train = source_of(), transform()
    monkeypatch.setattr(torch.Tensor, "to", full)
    assert on_device(source, train, CPU, torch.float32, said.append, channels_last=True) is None
    assert len(said) == 1


def test_photos_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident, "free_bytes", lambda device: 10**6)
    photos = transforms_for(DataConfig(random_resized_crop=True, image_size=4), (5, 5))[0]
    assert on_device(source_of(), photos, CPU, torch.float32, pytest.fail, channels_last=True) is None


@pytest.mark.parametrize("view", [None, 5])
def test_the_draws_are_those_of_a_loaded_batch(view: int | None) -> None:
    source, train = source_of(), replace(transform(crop_padding=2), view=view)
    images = resident.ResidentImages(source.images, source.labels, train, torch.float32, channels_last=True, backend="reference")
    loaded = next(source.batches(None, 6, transform=train, generator=torch.Generator().manual_seed(3)))
    images.begin(train.key_of(torch.Generator().manual_seed(3)))
    again, labels = images.batch(torch.arange(6))
    assert torch.equal(again, loaded.images) and torch.equal(labels, loaded.labels)
    other = next(source.batches(None, 6, transform=train, generator=torch.Generator().manual_seed(4)))
    assert torch.equal(other.images, loaded.images) == (view is not None)
