"""The batch-in-lanes executor of the native module: whole extractors in float32 on the CPU, one image per SIMD lane.

Between two operations a value is laid out (H, W, C, lanes), and all operations run for one group of images before the next group
begins, so that activations stay in the cache and no width is padded. Weights are read in place, from the arena. Lanes never mix: on
one kind of processor an image's features have the same bits in any batch and for any number of threads.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from der_fast import native
from der_fast.compaction.arena import Arena
from der_fast.compaction.program import AFFINE, BIAS, CONV, IMAGE, MEAN, POOL, WIDEN
from der_fast.model.architecture import IMAGE_CHANNELS

_KINDS = {CONV: 0, BIAS: 1, AFFINE: 2, POOL: 3, WIDEN: 4, MEAN: 5}


@functools.cache
def available() -> tuple[bool, str]:
    """Return whether the executor runs here, and with which instruction set or why not."""
    built, reason = native.available()
    if not built:
        return False, reason
    isa = native.lanes_isa()
    return (True, isa) if isa else (False, "this processor has neither AVX-512 nor AVX2")


def suits(arena: Arena) -> bool:
    """Whether the executor can run this arena in place: float32 weights in layout KRSC on the CPU."""
    return arena.dtype == torch.float32 and arena.layout == "KRSC" and arena.storage.device.type == "cpu"


class LanesProgram:
    """An arena's operations, checked and translated once; `run` executes several together."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        offsets = {entry.name: entry.offset for entry in arena.entries}
        numbers = {IMAGE: 0}
        rows: list[tuple[int, ...]] = []
        for number, op in enumerate(arena.ops, 1):
            numbers[op.target] = number
            first, second = ("scale", "shift") if op.kind == AFFINE else ("weight", "bias")
            weight, bias = (offsets.get(f"{op.target}.{name}", -1) for name in (first, second))
            residual = numbers[op.residual] if op.residual else -1
            rows.append(
                (_KINDS[op.kind], numbers[op.source], residual, op.inputs, op.outputs, op.kernel, op.stride, int(op.relu), weight, bias)
            )
        self.program = native.lanes_program(IMAGE_CHANNELS, rows, arena.nbytes)

    @property
    def features(self) -> int:
        """Number of stored features."""
        return int(self.program.features)


def run(programs: Sequence[LanesProgram], images: Tensor, threads: int) -> Tensor:
    """Return the stored features of all programs side by side, (N, Σ F) float32.

    Args:
        programs: in the order of their features.
        images: (N, 3, H, W) float32 on the CPU, any strides.
        threads: at most this many.
    """
    images = images.detach()
    out = torch.empty(images.shape[0], sum(program.features for program in programs))
    arenas = [native.facts_of(program.arena.storage) for program in programs]
    native.run_lanes([program.program for program in programs], arenas, native.facts_of(images), native.facts_of(out), threads)
    return out
