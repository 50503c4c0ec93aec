"""A compact extractor: an arena that can be called like a network."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from der_fast.compaction.arena import Arena
from der_fast.compaction.bank import strategies
from der_fast.kernels import choices


class CompactExtractor(nn.Module):
    """Maps images (N, 3, H, W) of any dtype to features (N, F); for inference only.

    It has no parameters and no buffers, so that nothing is trained, averaged or saved twice: `Arena.save` stores it. Moving it to a
    device moves the arena; a cast has no effect.

    Args:
        arena: made by `pack`.
        dtype: to compute in; default: the arena's. Features have this dtype, or the arena's if that is faster.

    Attributes:
        arena: the weights.
        runnable: the arena with its views, for the strategies.
    """

    def __init__(self, arena: Arena, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.training = False
        self.dtype = dtype or arena.dtype
        self._hold(arena)

    def _hold(self, arena: Arena) -> None:
        self.arena = arena
        self.runnable = strategies.Runnable(arena, self.dtype)

    @property
    def features(self) -> int:
        """Length of the feature vector."""
        return self.arena.features

    @property
    def widths(self) -> dict[str, int]:
        """Kept channels of every group."""
        return self.arena.widths

    @property
    def parameter_count(self) -> int:
        """Parameters of the compact network before folding, what the paper counts."""
        return self.arena.parameters

    @property
    def stored_parameters(self) -> int:
        """Number of stored entries, padding included."""
        return self.arena.stored_parameters

    def train(self, mode: bool = True) -> CompactExtractor:
        """Stay in evaluation mode, whatever `mode` is."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return the features (N, F)."""
        with torch.autocast(images.device.type, enabled=False):
            return strategies.run([self.runnable], images, "auto", choices.shared())[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompactExtractor:
        # A cast leaves bytes alone, so only a move changes anything.
        storage = fn(self.arena.storage)
        if storage is not self.arena.storage:
            self._hold(dataclasses.replace(self.arena, storage=storage))
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        # Views and the native program are built again: copies of them would be a second set of weights.
        return {**self.__dict__, "runnable": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._hold(self.arena)
