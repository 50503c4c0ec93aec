from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from der_fast.model.readout import linear_readout
from der_fast.training import latency
from der_fast.training.latency import latencies_ms, whole_model


class Clock:
    """Each call of a network takes that network's next number of seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def network(self, name: str, seconds: list[float]) -> Callable[[Tensor], Tensor]:
        left = iter(seconds)

        def call(image: Tensor) -> Tensor:
            assert not torch.is_grad_enabled()
            self.order.append(name)
            self.now += next(left)
            return image

        return call


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(latency, "REPEATS", 15)
    monkeypatch.setattr(latency.time, "perf_counter", lambda: made.now)
    return made


@pytest.mark.parametrize(
    ("seconds", "calls", "median"),
    [
        ([9.0] + [0.001, 0.002, 0.003] * 5, 16, 2.0),  # the first call warms up and does not count
        ([9.0] + [0.4] * 15, 4, 400.0),  # three calls already take more than a second
        ([9.0, 0.5, 0.3, 0.1, 0.1, 0.7] + [0.1] * 20, 5, 200.0),
    ],
)
def test_the_median_of_many_calls_or_of_a_second(seconds: list[float], calls: int, median: float, clock: Clock) -> None:
    (found,) = latencies_ms(torch.zeros(1, 3, 4, 4), clock.network("a", seconds))
    assert found.median == pytest.approx(median)
    assert len(clock.order) == calls


def test_the_spread_is_that_of_the_middle_half(clock: Clock) -> None:
    # In order: four of 1 ms, five of 3 ms, five of 5 ms, and one that was disturbed; the quartiles are 2 ms and 5 ms.
    odd = [0.003] * 5 + [0.005] * 5 + [0.001] * 4 + [9.0]
    (found,) = latencies_ms(torch.zeros(1, 3, 4, 4), clock.network("a", [9.0, *odd]))
    assert found == (pytest.approx(3.0), pytest.approx(1.5))


def test_networks_are_called_in_turn(clock: Clock) -> None:
    # The machine gets ten times slower half way through: whoever is called then must not look worse for it.
    slow = [1.0] * 8 + [10.0] * 8
    calls = [clock.network("a", [0.001 * factor for factor in slow]), clock.network("b", [0.002 * factor for factor in slow])]
    one, other = latencies_ms(torch.zeros(1, 3, 4, 4), *calls)
    assert clock.order == ["a", "b"] * 16
    assert other.median / one.median == pytest.approx(2)


def test_the_whole_model_is_bank_and_classifier() -> None:
    bank, head = nn.Flatten(), linear_readout(nn.Linear(12, 2))
    images = torch.rand(3, 3, 2, 2)
    assert torch.equal(whole_model(bank, head)(images), head(images.flatten(1)))


def test_a_bank_in_bfloat16_has_a_latency() -> None:
    head = linear_readout(torch.nn.Linear(4, 2))
    call = whole_model(torch.nn.Flatten().bfloat16(), head)
    features = torch.randn(3, 4, 1, 1).bfloat16()
    assert torch.equal(call(features), head(features.flatten(1).float()))
