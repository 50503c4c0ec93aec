"""The strategies that can run one arena's program, and which of them this processor supports.

Measured and rejected, for ten extractors of a ResNet-18 on a Xeon with AVX-512 (`python -m bench strategies`, time relative to plain):
all stems as one convolution 1.03; all extractors as one network of grouped convolutions 1.14; weights in oneDNN's own format 0.92, the
same as fused without it; traced and frozen 1.35. The lanes take 0.50.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from der_fast.compaction.arena import Arena
from der_fast.compaction.bank import lanes, onednn
from der_fast.compaction.bank.execute import execute
from der_fast.compaction.bank.lanes import LanesProgram
from der_fast.compaction.program import CONV
from der_fast.kernels.choices import Choices

PLAIN, FUSED, LANES = "plain", "fused", "lanes"
STRATEGIES = ("auto", PLAIN, FUSED, LANES)
# Strategies for a whole bank on a GPU: extractors on parallel streams, or all of them in one launch per layer.
STREAMS, GROUPED = "streams", "grouped"
BANK_STRATEGIES = (*STRATEGIES, STREAMS, GROUPED)
# Images per thread that a measurement runs, and the multiplications per thread above which it runs only one vector of images.
_IMAGES, _FEW_IMAGES, _MANY = 32, 16, 4e9


class Runnable:
    """An arena with everything that the strategies need, made once.

    Args:
        arena: the weights.
        dtype: to compute in; default: the arena's. A strategy that supports only the arena's dtype keeps that.

    Attributes:
        arena: the weights.
        dtype: to compute in.
    """

    def __init__(self, arena: Arena, dtype: torch.dtype | None = None) -> None:
        self.arena = arena
        self.dtype = dtype or arena.dtype
        size = max(arena.stored_parameters, 1).bit_length()
        self._name = f"{arena.architecture.name}|{str(self.dtype).removeprefix('torch.')}|{arena.layout}|2^{size}"

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.arena.storage.device

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Views of the arena; copies for entries of another dtype, made when a strategy first needs them."""
        return {name: tensor.to(self.dtype) for name, tensor in self.arena.tensors().items()}

    def forget_copies(self) -> None:
        """Free the copies that measuring the strategies has left behind."""
        if self.dtype != self.arena.dtype:
            self.__dict__.pop("tensors", None)

    @cached_property
    def program(self) -> LanesProgram:
        """The program for the batch-in-lanes executor; built on first use."""
        return LanesProgram(self.arena)

    def strategies(self) -> tuple[str, ...]:
        """Return the strategies that can run here, the most promising first."""
        if self.device.type != "cpu":
            return (PLAIN,)
        names = [LANES] if lanes.suits(self.arena) and lanes.available()[0] else []
        names += [FUSED] if self.dtype != torch.float64 and onednn.available(self.dtype) else []
        return (*names, PLAIN)

    def prepared(self, images: Tensor) -> Tensor:
        """Return images as the convolutions need them: in the dtype of the computation and the weights' memory format."""
        channels_last = self.arena.layout == "KRSC"
        return images.to(self.dtype, memory_format=torch.channels_last if channels_last else torch.contiguous_format)

    def run(self, strategy: str, images: Tensor) -> Tensor:
        """Return the stored features of prepared images."""
        if strategy == LANES:
            return lanes.run([self.program], images.float(), torch.get_num_threads())
        return (onednn.execute_fused if strategy == FUSED else execute)(self.arena.ops, self.tensors, images)

    def key(self, images: Tensor) -> str:
        """Return the key of a remembered choice: everything that the time depends on, sizes in powers of two."""
        threads = torch.get_num_threads()
        count = 1 << (min(len(images), _IMAGES * threads) - 1).bit_length()
        return f"{self._name}|{threads} threads|{count}x{images.shape[2]}x{images.shape[3]}"

    def sample(self, images: Tensor) -> Tensor:
        """Return the images that a measurement runs."""
        work = macs(self.arena, *images.shape[2:])
        return images[: torch.get_num_threads() * (_IMAGES if work * _IMAGES <= _MANY else _FEW_IMAGES)]


def true_features(runnable: Runnable, stored: Tensor) -> Tensor:
    """Return the features without those that are padding."""
    index = runnable.arena.feature_index
    return stored if index is None else stored.index_select(1, index)


def run(runnables: Sequence[Runnable], images: Tensor, strategy: str, choices: Choices) -> list[Tensor]:
    """Return the features (N, F_i) of every runnable, in its dtype or, from the lanes, in float32.

    Args:
        runnables: all on the images' device.
        images: (N, 3, H, W), any dtype and strides.
        strategy: 'auto' for the fastest, or the one to use wherever it can run.
        choices: remembers which is the fastest.
    """
    prepared: dict[tuple[torch.dtype, str], Tensor] = {}
    features: list[Tensor | None] = [None] * len(runnables)
    together: list[int] = []
    for index, runnable in enumerate(runnables):
        arena = runnable.arena
        if not arena.ops or not len(images):
            features[index] = images.new_zeros(len(images), arena.features, dtype=runnable.dtype)
            continue
        batch = prepared.setdefault((runnable.dtype, arena.layout), runnable.prepared(images))
        chosen = _chosen(runnable, batch, strategy, choices)
        if chosen == LANES:
            runnable.forget_copies()
            together.append(index)
        else:
            features[index] = true_features(runnable, runnable.run(chosen, batch))
    if together:
        programs = [runnables[index].program for index in together]
        stored = lanes.run(programs, images.float(), torch.get_num_threads())
        for index, part in zip(together, torch.split(stored, [program.features for program in programs], 1), strict=True):
            features[index] = true_features(runnables[index], part)
    return [part for part in features if part is not None]


def _chosen(runnable: Runnable, images: Tensor, strategy: str, choices: Choices) -> str:
    possible = runnable.strategies()
    if strategy in possible or len(possible) == 1:
        return strategy if strategy in possible else possible[0]
    if strategy != "auto":
        return PLAIN
    sample = runnable.sample(images)
    runs: dict[str, Callable[[], object]] = {name: lambda name=name: runnable.run(name, sample) for name in possible}  # type: ignore[misc]
    return choices.fastest(runnable.key(images), runs, what="frozen extractors run")


def macs(arena: Arena, height: int, width: int) -> int:
    """Return the multiplications for one image of the given size."""
    sizes = {"image": (height, width)}
    total = 0
    for op in arena.ops:
        stride = 2 if op.kind == "pool" else op.stride
        rows, columns = (math.ceil(side / stride) for side in sizes[op.source])
        sizes[op.target] = rows, columns
        total += op.inputs * op.outputs * op.kernel**2 * rows * columns if op.kind == CONV else 0
    return total
