"""How long one image takes: median wall time at batch 1, of several networks in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from der_fast.model.readout import Readout

REPEATS = 15
LONGEST_SECONDS = 1.0


class Latency(NamedTuple):
    """Milliseconds: the median over the rounds, and half of their interquartile range."""

    median: float
    spread: float


@torch.no_grad()
def latencies_ms(image: Tensor, *calls: Callable[[Tensor], Tensor]) -> list[Latency]:
    """Return how long every `call(image)` takes, over up to 15 rounds or one second each, after a warm-up round.

    A round calls each network once, so that other load on the machine slows all of them alike.

    Args:
        image: (1, 3, H, W) on the networks' device.
        calls: the networks to compare.
    """
    for call in calls:
        call(image)
    rounds: list[list[float]] = []
    spent = 0.0
    while len(rounds) < REPEATS and (len(rounds) < 3 or spent < LONGEST_SECONDS * len(calls)):
        rounds.append([_seconds(call, image) for call in calls])
        spent += sum(rounds[-1])
    return [_summary(times) for times in zip(*rounds, strict=True)]


def _summary(seconds: tuple[float, ...]) -> Latency:
    if len(seconds) == 1:
        return Latency(1000 * seconds[0], 0.0)
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Latency(1000 * middle, 500 * (high - low))


def _seconds(call: Callable[[Tensor], Tensor], image: Tensor) -> float:
    cuda = image.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(image.device)
    started = time.perf_counter()
    call(image)
    if cuda:
        torch.cuda.synchronize(image.device)
    return time.perf_counter() - started


def whole_model(bank: nn.Module, readout: Readout) -> Callable[[Tensor], Tensor]:
    """Return the function images → logits, float32 for any dtype of the bank."""
    return lambda images: readout(bank(images).float())
