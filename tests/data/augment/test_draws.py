"""Random numbers by epoch and image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from der_fast.data.augment import draws


def test_numbers_depend_on_key_and_image_alone():
    whole = draws.uniform(7, np.arange(1000))
    assert whole.shape == (1000, 24) and whole.min() >= 0 and whole.max() < 1
    some = np.array([999, 3, 3, 500])
    assert np.array_equal(draws.uniform(7, some), whole[some])
    assert not np.isin(draws.uniform(8, np.arange(1000)), whole).any()


def test_numbers_look_independent():
    """Means, and correlations between neighbouring numbers and images, within five standard errors."""
    numbers = draws.uniform(2**62 + 1, np.arange(20_000))
    assert abs(numbers.mean() - 0.5) < 5 / np.sqrt(12 * numbers.size)
    centred = (numbers - 0.5) * np.sqrt(12)
    for product in (centred[:, 1:] * centred[:, :-1], centred[1:] * centred[:-1]):
        assert abs(product.mean()) < 5 / np.sqrt(product.size)
    assert len(np.unique(numbers)) == numbers.size


@settings(derandomize=True, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), min_size=1, max_size=30), st.integers(0, 2**62))
def test_windows_lie_in_their_image_and_have_the_shape_of_a_random_resized_crop(sizes, key):
    heights, widths = np.array(sizes, dtype=np.int64).T
    windows = draws.random_windows(draws.uniform(key, np.arange(len(sizes))), heights, widths)
    top, left, height, width = windows.T
    assert (windows[:, :2] >= 0).all() and (windows[:, 2:] > 0).all()
    assert (top + height <= heights).all() and (left + width <= widths).all()
    large = (heights > 200) & (widths > 200) & (heights < 2 * widths) & (widths < 2 * heights)
    aspect, share = width / height, width * height / (heights * widths)
    assert ((aspect[large] > 0.74) & (aspect[large] < 1.35) & (share[large] > 0.075)).all()


def test_an_image_that_no_attempt_fits_gives_its_middle():
    numbers = draws.uniform(1, np.arange(2))
    windows = draws.random_windows(numbers, np.array([1, 3000]), np.array([3000, 1]))
    assert windows.tolist() == [[0, 1499 + 0, 1, 1], [1499 + 0, 0, 1, 1]]


def test_central_squares():
    assert draws.central_squares(np.array([10, 7]), np.array([4, 7])).tolist() == [[3, 0, 4, 4], [0, 0, 7, 7]]


def test_half_is_mirrored_and_jitter_stays_in_its_range():
    numbers = draws.uniform(3, np.arange(4000))
    assert abs(draws.flips(numbers).mean() - 0.5) < 0.04
    factors = draws.brightness(numbers, 0.3)
    assert 0.7 <= factors.min() < 0.71 and 1.29 < factors.max() <= 1.3


@pytest.mark.parametrize("seed", [0, 1])
def test_a_key_comes_from_the_generator(seed):
    first, again = (draws.key_of(torch.Generator().manual_seed(seed)) for _ in range(2))
    assert first == again != draws.key_of(torch.Generator().manual_seed(seed + 1))
