"""`augment` against a loop over pixels in Python floats."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from der_fast.kernels.augment import augment

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


def draw(count, height, width, padding, seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        "images": torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=generator),
        "row": torch.randint(0, 2 * padding + 1, (count,), generator=generator),
        "col": torch.randint(0, 2 * padding + 1, (count,), generator=generator),
        "flip": torch.rand(count, generator=generator) < 0.5,
        "brightness": torch.rand(count, generator=generator) * 2,
        "padding": padding,
    }


def by_hand(images, row, col, flip, brightness, padding, mean=MEAN, std=STD):
    """The definition, one pixel at a time, in double precision."""
    count, height, width, _ = images.shape
    out = torch.zeros(count, 3, height, width, dtype=torch.float64)
    for n in range(count):
        for h in range(height):
            for w in range(width):
                y = h + int(row[n]) - padding
                x = (width - 1 - w if flip[n] else w) + int(col[n]) - padding
                inside = 0 <= y < height and 0 <= x < width
                for c in range(3):
                    pixel = int(images[n, y, x, c]) if inside else 0
                    value = min(float(brightness[n]) * pixel / 255, 1.0)
                    out[n, c, h, w] = (value - mean[c]) / std[c]
    return out


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(1, 4),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    padding=st.integers(0, 4),
    seed=st.integers(0, 2**31),
)
def test_equals_the_definition(count, height, width, padding, seed):
    case = draw(count, height, width, padding, seed)
    expected = by_hand(**case)
    exact = augment(**case, mean=MEAN, std=STD, dtype=torch.float64)
    single = augment(**case, mean=MEAN, std=STD)
    assert exact.dtype == torch.float64 and single.dtype == torch.float32
    torch.testing.assert_close(exact, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(single, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("height", "width", "padding"), [(32, 32, 4), (1, 1, 0), (1, 1, 3), (7, 5, 2), (3, 8, 0)])
def test_memory_layout_and_values_do_not_depend_on_each_other(height, width, padding):
    case = draw(5, height, width, padding, seed=3)
    last = augment(**case, mean=MEAN, std=STD, channels_last=True)
    first = augment(**case, mean=MEAN, std=STD, channels_last=False)
    assert last.permute(0, 2, 3, 1).is_contiguous()
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert first.is_contiguous()
    assert torch.equal(last, first)


def test_no_change_is_plain_normalisation():
    images = torch.arange(2 * 4 * 5 * 3).to(torch.uint8).view(2, 4, 5, 3)
    zero = torch.zeros(2, dtype=torch.int64)
    out = augment(images, row=zero, col=zero, flip=zero.bool(), brightness=torch.ones(2), padding=0, mean=(0, 0, 0), std=(1, 1, 1))
    torch.testing.assert_close(out, images.permute(0, 3, 1, 2) / 255)


def test_border_is_black_before_normalisation_and_stays_black_when_brightened():
    images = torch.full((1, 4, 4, 3), 255, dtype=torch.uint8)
    corner = torch.zeros(1, dtype=torch.int64)
    out = augment(images, row=corner, col=corner, flip=corner.bool(), brightness=torch.tensor([1.5]), padding=4, mean=MEAN, std=STD)
    black = -torch.tensor(MEAN) / torch.tensor(STD)
    torch.testing.assert_close(out, black.view(1, 3, 1, 1).expand(1, 3, 4, 4))


def test_brightness_is_clipped_at_white():
    images = torch.full((2, 2, 2, 3), 200, dtype=torch.uint8)
    zero = torch.zeros(2, dtype=torch.int64)
    brightness = torch.tensor([1.25, 1.5])
    out = augment(images, row=zero, col=zero, flip=zero.bool(), brightness=brightness, padding=0, mean=(0, 0, 0), std=(1, 1, 1))
    torch.testing.assert_close(out[0], torch.full((3, 2, 2), 250 / 255))
    assert torch.equal(out[1], torch.ones(3, 2, 2))


def test_images_are_left_alone():
    case = draw(6, 8, 8, 2, seed=9)
    before = case["images"].clone()
    augment(**case, mean=MEAN, std=STD)
    augment(
        **{**case, "padding": 0, "row": torch.zeros(6, dtype=torch.int64), "col": torch.zeros(6, dtype=torch.int64)}, mean=MEAN, std=STD
    )
    assert torch.equal(case["images"], before)


def test_strided_images():
    case = draw(4, 6, 7, 2, seed=4)
    wide = torch.zeros(4, 6, 14, 3, dtype=torch.uint8)
    wide[:, :, ::2] = case["images"]
    expected = augment(**case, mean=MEAN, std=STD)
    assert torch.equal(augment(**{**case, "images": wide[:, :, ::2]}, mean=MEAN, std=STD), expected)
    cut = {**case, "row": torch.zeros(4, dtype=torch.int64), "col": torch.zeros(4, dtype=torch.int64), "padding": 0}
    whole = augment(**cut, mean=MEAN, std=STD)
    assert torch.equal(augment(**{**cut, "images": wide[:, :, ::2]}, mean=MEAN, std=STD), whole)


def test_half_precision_is_the_rounded_single_precision():
    case = draw(4, 6, 6, 2, seed=5)
    single = augment(**case, mean=MEAN, std=STD)
    assert torch.equal(augment(**case, mean=MEAN, std=STD, dtype=torch.bfloat16), single.bfloat16())


def test_no_images():
    out = augment(**draw(0, 4, 4, 2, seed=1), mean=MEAN, std=STD)
    assert out.shape == (0, 3, 4, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(4, 6, 6, 3)}, "uint8"),
        ({"images": torch.zeros(4, 3, 6, 6, dtype=torch.uint8)}, "N × H × W × 3"),
        ({"row": torch.full((4,), 5)}, r"row must lie in \[0, 4\]"),
        ({"col": torch.full((4,), -1)}, r"col must lie in \[0, 4\]"),
        ({"row": torch.zeros(3, dtype=torch.int64)}, "row must hold one value per image"),
        ({"col": torch.zeros(4)}, "col must hold"),
        ({"flip": torch.zeros(4)}, "flip must hold"),
        ({"brightness": torch.zeros(4, dtype=torch.int64)}, "brightness must hold"),
        ({"row": torch.zeros(4, dtype=torch.int64, device="meta")}, "row must hold .* on cpu.* on meta"),
        ({"padding": -1}, "padding must be"),
        ({"std": (0.2, 0.0, 0.2)}, "std > 0"),
        ({"mean": (0.2, 0.0)}, "three numbers"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    arguments = {**draw(4, 6, 6, 2, seed=5), "mean": MEAN, "std": STD, **change}
    with pytest.raises(ValueError, match=message):
        augment(**arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_gpu_equals_cpu():
    case = draw(64, 32, 32, 4, seed=8)
    there = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in case.items()}
    torch.testing.assert_close(augment(**there, mean=MEAN, std=STD).cpu(), augment(**case, mean=MEAN, std=STD), rtol=1e-6, atol=1e-6)
