"""The frozen bank: every finished extractor, run together without gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from der_fast.compaction.bank import strategies
from der_fast.compaction.bank.extractor import CompactExtractor
from der_fast.compaction.bank.together import Together
from der_fast.errors import ConfigError
from der_fast.kernels import choices as remembered
from der_fast.kernels.choices import Choices
from der_fast.model.extractor import Extractor

Member = CompactExtractor | Extractor


class FrozenBank(nn.Module):
    """All frozen extractors as one module: images (N, 3, H, W) → concatenated features (N, Σ F_i).

    Frozen means: no gradient, no activation kept for one, batch-norm always in evaluation mode. On the CPU the compact extractors run
    with the strategy that is fastest here; on a GPU they run together in one CUDA graph, with the faster of two strategies (`Together`).

    Args:
        extractors: compact ones; a dense `Extractor` (nothing pruned, nothing folded) is run as it is.
        strategy: 'auto', or one of `strategies.BANK_STRATEGIES`, which then runs wherever it can.
        choices: remembers which strategy is the fastest; the user's by default.

    Raises:
        ConfigError: an unknown strategy.
    """

    def __init__(self, extractors: Sequence[Member] = (), *, strategy: str = "auto", choices: Choices | None = None) -> None:
        super().__init__()
        if strategy not in strategies.BANK_STRATEGIES:
            raise ConfigError(f"unknown strategy {strategy!r}: choose from {', '.join(strategies.BANK_STRATEGIES)}")
        self.strategy = strategy
        self._choices = choices
        self._together: Together | None = None
        self.extractors = nn.ModuleList()
        for extractor in extractors:
            self.append(extractor)

    def __len__(self) -> int:
        return len(self.extractors)

    @property
    def choices(self) -> Choices:
        """Where the choice of a strategy is remembered."""
        return self._choices or remembered.shared()

    @property
    def features(self) -> int:
        """Length of the concatenated feature vector."""
        return sum(self.widths)

    @property
    def widths(self) -> list[int]:
        """Length of every extractor's feature vector."""
        return [extractor.features for extractor in self._members()]

    def append(self, extractor: Member) -> None:
        """Add a finished extractor; it is frozen from now on."""
        extractor.requires_grad_(False)
        self.extractors.append(extractor.eval())
        self._together = None

    def train(self, mode: bool = True) -> FrozenBank:
        """Stay in evaluation mode, whatever `mode` is: frozen batch-norm keeps its statistics."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return the features of all extractors side by side, in the order in which they were added.

        Compact extractors compute in their own dtype, with or without autocast; if that is less precise, features may still be float32.
        """
        members = self._members()
        if not members:
            return images.new_zeros(images.shape[0], 0)
        if images.device.type == "cuda" and len(images):
            self._together = self._together or Together(members, self.strategy, self.choices)
            return self._together(images)
        compact = [member for member in members if isinstance(member, CompactExtractor)]
        with torch.autocast(images.device.type, enabled=False):
            done = iter(strategies.run([member.runnable for member in compact], images, self.strategy, self.choices))
        return torch.cat([next(done) if isinstance(member, CompactExtractor) else member(images) for member in members], 1)

    def parameter_counts(self) -> list[int]:
        """Number of parameters of every extractor, before folding and without padding."""
        return [
            member.parameter_count if isinstance(member, CompactExtractor) else sum(p.numel() for p in member.parameters())
            for member in self._members()
        ]

    @property
    def nbytes(self) -> int:
        """Size of all arenas in bytes."""
        return sum(member.arena.nbytes for member in self._members() if isinstance(member, CompactExtractor))

    def _members(self) -> list[Member]:
        return [cast(Member, extractor) for extractor in self.extractors]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenBank:
        # A captured graph reads the weights from their old place.
        self._together = None
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_together": None}
