from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from der_fast.training import latency
from der_fast.training.latency import latency_ms, whole_model


class Clock:
    """Each call of the network takes the next number of seconds."""

    def __init__(self, seconds: list[float]) -> None:
        self.left: Iterator[float] = iter(seconds)
        self.now = 0.0
        self.calls = 0

    def call(self, image: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        self.calls += 1
        self.now += next(self.left)
        return image


@pytest.mark.parametrize(
    ("seconds", "calls", "median"),
    [
        ([9.0] + [0.001, 0.002, 0.003] * 5, 16, 2.0),  # the first call warms up and does not count
        ([9.0] + [0.4] * 15, 4, 400.0),  # three calls already take more than a second
        ([9.0, 0.5, 0.3, 0.1, 0.1, 0.7] + [0.1] * 20, 5, 200.0),
    ],
)
def test_the_median_of_many_calls_or_of_a_second(seconds: list[float], calls: int, median: float, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(seconds)
    monkeypatch.setattr(latency, "REPEATS", 15)
    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock.now)
    assert latency_ms(clock.call, torch.zeros(1, 3, 4, 4)) == pytest.approx(median)
    assert clock.calls == calls


def test_the_whole_model_is_bank_and_classifier() -> None:
    bank, head = nn.Flatten(), nn.Linear(12, 2)
    images = torch.rand(3, 3, 2, 2)
    assert torch.equal(whole_model(bank, head)(images), head(images.flatten(1)))
