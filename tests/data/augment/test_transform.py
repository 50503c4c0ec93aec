"""Transforms: what reaches the network."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from der_fast.config.schema import DataConfig
from der_fast.data import transforms_for
from der_fast.data.augment.transform import resized_windows
from der_fast.errors import DataError

PLAIN = DataConfig(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), crop_padding=0, flip=False, brightness=0.0)
PHOTOS, _ = transforms_for(DataConfig(random_resized_crop=True), (32, 32))


def images(count, height, width, seed=0):
    return torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def drawn(transform, pixels, key=5):
    return transform.draw(key, torch.arange(len(pixels)), tuple(pixels.shape[1:3]))


def as_float(pixels):
    return pixels.permute(0, 3, 1, 2) / 255


def test_evaluation_only_normalises_and_needs_nothing_drawn():
    config = DataConfig()
    _, evaluation = transforms_for(config, (6, 7))
    pixels = images(3, 6, 7)
    expected = (as_float(pixels) - torch.tensor(config.mean).view(3, 1, 1)) / torch.tensor(config.std).view(3, 1, 1)
    torch.testing.assert_close(evaluation(pixels), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(evaluation(pixels), evaluation(pixels, drawn(transforms_for(config, (6, 7))[0], pixels)))


def test_everything_off_is_no_augmentation():
    train, evaluation = transforms_for(PLAIN, (6, 6))
    pixels = images(4, 6, 6)
    assert torch.equal(train(pixels, drawn(train, pixels)), evaluation(pixels))


def test_every_crop_offset_and_both_directions_occur_and_nothing_else():
    train, _ = transforms_for(dataclasses.replace(PLAIN, crop_padding=1, flip=True), (3, 3))
    pixel = images(1, 3, 3)
    padded = torch.nn.functional.pad(pixel[0].permute(2, 0, 1), (1, 1, 1, 1))
    allowed = {}
    for row in range(3):
        for col in range(3):
            crop = padded[:, row : row + 3, col : col + 3]
            allowed[tuple(crop.flatten().tolist())] = (row, col, False)
            allowed[tuple(crop.flip(2).flatten().tolist())] = (row, col, True)
    many = pixel.expand(600, -1, -1, -1)
    out = (train(many, drawn(train, many)) * 255).round().int()
    seen = {allowed[tuple(entry.flatten().tolist())] for entry in out}
    assert len(seen) == 18


def test_brightness_factors_fill_their_range():
    train, _ = transforms_for(dataclasses.replace(PLAIN, brightness=0.4), (1, 1))
    grey = torch.full((2000, 1, 1, 3), 100, dtype=torch.uint8)
    factors = train(grey, drawn(train, grey))[:, 0, 0, 0] * 255 / 100
    assert 0.6 <= factors.min() < 0.62 and 1.38 < factors.max() <= 1.4 + 1e-6
    assert abs(factors.mean() - 1) < 0.02


def test_strong_brightness_never_turns_negative():
    train, _ = transforms_for(dataclasses.replace(PLAIN, brightness=3.0), (1, 1))
    grey = torch.full((500, 1, 1, 3), 200, dtype=torch.uint8)
    out = train(grey, drawn(train, grey))
    assert out.min() >= 0 and out.max() <= 1


def test_training_without_anything_drawn_is_refused():
    train, _ = transforms_for(DataConfig(), (8, 8))
    with pytest.raises(ValueError, match=r"draw\(\)"):
        train(images(1, 8, 8))


def test_photos_are_stored_larger_and_cropped():
    config = DataConfig(image_size=224, random_resized_crop=True)
    train, evaluation = transforms_for(config, (256, 256))
    assert train.size == (224, 224) and train.stored_size == (256, 256)
    pixels = images(2, 256, 256)
    assert train(pixels, drawn(train, pixels)).shape == (2, 3, 224, 224)
    flat = dataclasses.replace(evaluation, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    torch.testing.assert_close(flat(pixels), as_float(pixels[:, 16:240, 16:240]))
    assert train(pixels, drawn(train, pixels)).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("side", [8, 9, 32, 33, 64, 100, 224, 225])
def test_stored_and_network_size_find_each_other(side):
    stored = transforms_for(DataConfig(image_size=side, random_resized_crop=True), (round(side * 256 / 224),) * 2)[0].stored_size
    train, _ = transforms_for(DataConfig(random_resized_crop=True), stored)
    assert train.size == (side, side)


@pytest.mark.parametrize(
    ("config", "stored"),
    [(DataConfig(image_size=32), (28, 28)), (DataConfig(image_size=224, random_resized_crop=True), (224, 224))],
)
def test_images_stored_at_another_size_are_refused(config, stored):
    with pytest.raises(DataError, match=f"stored at {stored[0]} × {stored[1]}"):
        transforms_for(config, stored)


def test_a_batch_of_another_size_is_refused():
    train, evaluation = transforms_for(DataConfig(), (8, 8))
    for transform in (train, evaluation):
        with pytest.raises(DataError, match="images are 9 × 8 pixels but the network takes 8 × 8"):
            transform(images(1, 9, 8))


@settings(max_examples=40, deadline=None)
@given(height=st.integers(1, 40), width=st.integers(1, 40), out=st.integers(1, 12), seed=st.integers(0, 2**31))
def test_random_resized_crop_keeps_shape_type_and_range(height, width, out, seed):
    pixels = images(5, height, width, seed).clamp(40, 200)
    windows = drawn(PHOTOS, pixels, seed).windows
    crops = resized_windows(pixels, (out, out + 1), windows)
    assert crops.shape == (5, out, out + 1, 3) and crops.dtype == torch.uint8
    assert crops.min() >= 40 and crops.max() <= 200
    assert (windows[:, 2:] >= 1).all() and (windows[:, :2] >= 0).all()
    assert (windows[:, :2] + windows[:, 2:] <= torch.tensor([height, width])).all()


def test_random_resized_crop_takes_the_areas_and_places_that_it_should():
    # Red is the row and green the column, so a crop shows where it was cut.
    ramp = torch.arange(200, dtype=torch.uint8)
    image = torch.stack([ramp[:, None].expand(200, 200), ramp[None].expand(200, 200), torch.zeros(200, 200, dtype=torch.uint8)], -1)
    many = image[None].expand(400, -1, -1, -1)
    crops = resized_windows(many, (10, 10), drawn(PHOTOS, many).windows).float()
    # The centres of the outermost of ten cells lie nine tenths of the side apart.
    heights = (crops[:, -1, :, 0].mean(1) - crops[:, 0, :, 0].mean(1)) / 0.9
    widths = (crops[:, :, -1, 1].mean(1) - crops[:, :, 0, 1].mean(1)) / 0.9
    area, aspect = heights * widths / 200**2, widths / heights
    assert area.min() > 0.06 and area.max() <= 1.03
    # Uniform in 0.08–1 has mean 0.54; large rectangles that are also long do not fit, which lowers it.
    assert 0.4 < area.mean() < 0.54
    assert aspect.min() > 0.72 and aspect.max() < 1.38
    centres = crops[:, :, :, 0].mean((1, 2))
    assert centres.min() < 60 and centres.max() > 140 and abs(centres.mean() - 100) < 6


def test_a_strip_that_no_rectangle_fits_gives_its_centre():
    strip = torch.zeros(3, 1, 300, 3, dtype=torch.uint8)
    strip[:, :, 149:151] = 90
    crops = resized_windows(strip, (4, 4), drawn(PHOTOS, strip).windows)
    assert crops.shape == (3, 4, 4, 3) and crops.float().mean() > 30


@pytest.mark.parametrize("photos", [False, True])
def test_what_is_done_to_an_image_depends_on_key_and_number_alone(photos):
    config = DataConfig(random_resized_crop=photos, image_size=21, flip=True, brightness=0.3)
    side = 24 if photos else 21
    train, _ = transforms_for(config, (side, side))
    pixels, numbers = images(12, side, side), torch.randperm(40)[:12]
    whole = train(pixels, train.draw(7, numbers, (side, side)))
    for index in range(12):
        one = numbers[index : index + 1]
        assert torch.equal(train(pixels[index : index + 1], train.draw(7, one, (side, side)))[0], whole[index])
    assert not torch.equal(train(pixels, train.draw(8, numbers, (side, side))), whole)
    cut = train.draw(7, numbers, (side, side)).at(3, 9)
    assert torch.equal(train(pixels[3:9], cut), whole[3:9])
