"""The frozen bank: every finished extractor, run together without gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from der_fast.model.extractor import Extractor


class FrozenBank(nn.Module):
    """All frozen extractors as one module: images (N, 3, H, W) → concatenated features (N, Σ F_i).

    Frozen means: no gradient, no activation kept for one, batch-norm always in evaluation mode.
    """

    def __init__(self, extractors: Sequence[Extractor] = ()) -> None:
        super().__init__()
        self.extractors = nn.ModuleList()
        for extractor in extractors:
            self.append(extractor)

    def __len__(self) -> int:
        return len(self.extractors)

    @property
    def features(self) -> int:
        """Length of the concatenated feature vector."""
        return sum(self.widths)

    @property
    def widths(self) -> list[int]:
        """Length of every extractor's feature vector."""
        return [cast(Extractor, extractor).features for extractor in self.extractors]

    def append(self, extractor: Extractor) -> None:
        """Add a finished extractor; it is frozen from now on."""
        extractor.requires_grad_(False)
        self.extractors.append(extractor.eval())

    def train(self, mode: bool = True) -> FrozenBank:
        """Stay in evaluation mode whatever is asked: frozen batch-norm keeps its statistics."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return the features of all extractors side by side, in the order in which they were added."""
        if not len(self):
            return images.new_zeros(images.shape[0], 0)
        return torch.cat([extractor(images) for extractor in self.extractors], 1)

    def parameter_counts(self) -> list[int]:
        """Number of parameters of every extractor."""
        return [sum(p.numel() for p in extractor.parameters()) for extractor in self.extractors]
