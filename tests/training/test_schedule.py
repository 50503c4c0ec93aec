from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from der_fast.config.schema import ClassifierConfig, ScheduleConfig
from der_fast.training.schedule import learning_rate, mask_scale, settled_from


def rates(config: ScheduleConfig) -> list[float]:
    return [learning_rate(config, epoch) for epoch in range(config.epochs)]


def expected(*parts: tuple[int, float]) -> list[float]:
    return [lr for count, lr in parts for _ in range(count)]


def test_cifar100_of_the_paper() -> None:
    config = ScheduleConfig(epochs=170, lr=0.1, milestones=(110, 130), gamma=0.1, warmup_epochs=10, warmup_lr=0.01)
    warm_up = [0.01, 0.019, 0.028, 0.037, 0.046, 0.055, 0.064, 0.073, 0.082, 0.091]
    assert rates(config) == pytest.approx(warm_up + expected((100, 0.1), (20, 0.01), (40, 0.001)))


def test_imagenet100_of_the_paper() -> None:
    config = ScheduleConfig(epochs=220, lr=0.1, milestones=(80, 140, 180, 200), gamma=0.1, warmup_epochs=20, warmup_lr=0.01)
    found = rates(config)
    assert found[:2] == pytest.approx([0.01, 0.0145])
    assert found[20:] == pytest.approx(expected((60, 0.1), (60, 0.01), (40, 0.001), (20, 1e-4), (20, 1e-5)))


def test_first_step_of_b50() -> None:
    config = ScheduleConfig(epochs=200, lr=0.1, milestones=(60, 120, 160), gamma=0.1, warmup_epochs=0)
    assert rates(config) == pytest.approx(expected((60, 0.1), (60, 0.01), (40, 0.001), (40, 1e-4)))


def test_classifier_stage_of_the_paper() -> None:
    config = ClassifierConfig(epochs=30, lr=0.1, milestones=(15,), gamma=0.1, warmup_epochs=0)
    assert rates(config) == pytest.approx(expected((15, 0.1), (15, 0.01)))


def test_a_milestone_within_the_warm_up_counts_from_its_end() -> None:
    config = ScheduleConfig(epochs=6, lr=1.0, milestones=(2,), gamma=0.5, warmup_epochs=4, warmup_lr=0.0)
    assert rates(config) == pytest.approx([0.0, 0.25, 0.5, 0.75, 0.5, 0.5])


@given(batches=st.integers(2, 500), s_max=st.floats(1.01, 1000))
def test_mask_scale_runs_linearly_from_the_inverse_of_s_max_to_s_max(batches: int, s_max: float) -> None:
    scales = [mask_scale(batch, batches, s_max) for batch in range(1, batches + 1)]
    assert scales[0] == pytest.approx(1 / s_max)
    assert scales[-1] == pytest.approx(s_max)
    assert scales[(batches - 1) // 2 if batches % 2 else 0] == pytest.approx((s_max + 1 / s_max) / 2 if batches % 2 else 1 / s_max)
    assert all(low < high for low, high in itertools.pairwise(scales))


@given(s_max=st.floats(1.01, 1000))
def test_a_single_batch_has_the_largest_scale(s_max: float) -> None:
    assert mask_scale(1, 1, s_max) == s_max


@pytest.mark.parametrize(
    ("epochs", "share", "first"),
    [(10, 0.0, 10), (10, 0.5, 5), (10, 0.92, 1), (10, 0.99, 1), (1, 0.9, 1), (2, 0.5, 1), (3, 0.1, 3), (170, 0.2, 136)],
)
def test_settled_from(epochs: int, share: float, first: int) -> None:
    assert settled_from(epochs, share) == first


@given(epochs=st.integers(1, 300), share=st.floats(0, 0.999))
def test_masks_are_learned_in_at_least_one_epoch(epochs: int, share: float) -> None:
    first = settled_from(epochs, share)
    assert 1 <= first <= epochs
    assert abs((epochs - first) - share * epochs) <= 0.5 or first == 1
