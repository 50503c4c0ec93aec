"""How long one image takes: median wall time at batch 1."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

REPEATS = 15
LONGEST_SECONDS = 1.0


@torch.no_grad()
def latency_ms(call: Callable[[Tensor], Tensor], image: Tensor) -> float:
    """Return the median time of `call(image)` in milliseconds, over up to 15 calls or one second, after a warm-up call.

    Args:
        call: the network.
        image: (1, 3, H, W) on the network's device.
    """
    cuda = image.device.type == "cuda"
    call(image)
    times: list[float] = []
    while len(times) < REPEATS and (len(times) < 3 or sum(times) < LONGEST_SECONDS):
        if cuda:
            torch.cuda.synchronize(image.device)
        started = time.perf_counter()
        call(image)
        if cuda:
            torch.cuda.synchronize(image.device)
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times)


def whole_model(bank: nn.Module, head: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the function images → logits."""
    return lambda images: head(bank(images))
