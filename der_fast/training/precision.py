"""Whether bfloat16 pays off on this processor: without AMX or AVX512-BF16 it takes several times as long as float32."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from der_fast.config.schema import Config
from der_fast.kernels.backend import resolve_precision
from der_fast.model.architecture import Architecture
from der_fast.model.extractor import Extractor
from der_fast.seeds import generator

# Number of images of a measured step, halved until a float32 step takes no longer than this.
_MOST_IMAGES, _SECONDS = 32, 0.1
_REPEATS = 3


@dataclass(frozen=True)
class PrecisionTimes:
    """How long a training step of an extractor takes, in milliseconds.

    Attributes:
        fp32, bf16: the best of a few steps.
        images: images per step.
    """

    fp32: float
    bf16: float
    images: int

    def __str__(self) -> str:
        """Both times, and what to do if bfloat16 is slower."""
        both = (
            f"a training step of {self.images} image(s) takes {self.bf16:.3g} ms in bf16 and {self.fp32:.3g} ms in fp32 on this processor"
        )
        return f"{both}: bf16 is slower here, use fp32 (runtime.precision)" if self.bf16 > self.fp32 else both


def measured_precision(architecture: Architecture, size: tuple[int, int], images: int, *, channels_last: bool = True) -> PrecisionTimes:
    """Time training steps of a new extractor on the CPU in both precisions; takes at most about a second unless bf16 is slower.

    Args:
        architecture: the extractor's.
        size: (height, width) in pixels of the network's input.
        images: images per batch; fewer are measured if they would take long.
        channels_last: memory layout.
    """
    extractor = Extractor(architecture).initialise(generator(0, "precision")).train()
    batch = torch.rand(min(images, _MOST_IMAGES), 3, *size, generator=generator(0, "precision", "images"))
    if channels_last:
        extractor.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        batch = batch.contiguous(memory_format=torch.channels_last)
    _step(extractor, batch[:2], bf16=False)
    while (fp32 := _step(extractor, batch, bf16=False)) > _SECONDS and len(batch) > 2:
        batch = batch[: max(len(batch) // 2, 2)]
    _step(extractor, batch[:2], bf16=True)
    bf16 = _step(extractor, batch, bf16=True)
    # If they are far apart, one measurement is enough.
    if bf16 < 3 * fp32:
        for _ in range(_REPEATS - 1):
            fp32, bf16 = min(fp32, _step(extractor, batch, bf16=False)), min(bf16, _step(extractor, batch, bf16=True))
    return PrecisionTimes(1e3 * fp32, 1e3 * bf16, len(batch))


def _step(extractor: Extractor, batch: Tensor, *, bf16: bool) -> float:
    """Return the seconds of a forward and a backward pass."""
    started = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        features = extractor(batch)
    # Only batch-norm's statistics are updated.
    torch.autograd.grad(F.mse_loss(features.float(), torch.zeros_like(features, dtype=torch.float32)), list(extractor.parameters()))
    return time.perf_counter() - started


def precision_note(config: Config, device: torch.device, architecture: Architecture, size: tuple[int, int]) -> str | None:
    """Return one line about the cost of the precision here: of bf16 on a CPU, of fp32 on a GPU that has bf16; else None."""
    if device.type == "cuda" and config.runtime.precision == "fp32" and resolve_precision("auto", device) == "bf16":
        return (
            "fp32 on this GPU: der_fast's convolutions run without tensor cores, at a small part of bf16's rate (an H100: 67 of 989 "
            "TFLOP/s); runtime.precision=bf16 is the default here"
        )
    if device.type != "cpu" or config.runtime.precision != "bf16":
        return None
    return str(measured_precision(architecture, size, config.first.batch_size, channels_last=config.runtime.channels_last))
