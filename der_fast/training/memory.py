"""The rehearsal memory: which images of earlier classes are kept (iCaRL's herding), and how many."""

from __future__ import annotations

import torch
from torch import Tensor

from der_fast.config.schema import MemoryConfig
from der_fast.data.source import ImageSource


def quota(config: MemoryConfig, seen: int) -> int:
    """Return exemplars per class once `seen` classes are known: the fixed number, or total // seen."""
    return config.per_class if config.per_class is not None else config.total // seen


def herding(features: Tensor, count: int) -> Tensor:
    """Return the positions of the `count` best exemplars of one class, best first (Rebuffi et al. 2017).

    With L2-normalised rows d_i and mean μ, picks argmax ⟨w, d_i⟩ and sets w ← w + μ − d_i, starting from w = μ. The order is a
    ranking: a smaller count gives a prefix.

    Args:
        features: (n, F), any floating dtype; normalised here.
        count: how many; at most n are returned.
    """
    rows = torch.nn.functional.normalize(features.double(), dim=1)
    mean = rows.mean(0)
    wanted = mean.clone()
    chosen: list[int] = []
    free = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    for _ in range(min(count, len(rows))):
        score = (rows @ wanted).masked_fill(~free, -torch.inf)
        best = int(score.argmax())
        chosen.append(best)
        free[best] = False
        wanted += mean - rows[best]
    return torch.tensor(chosen, dtype=torch.int64)


def truncate(memory: ImageSource, count: int) -> ImageSource:
    """Keep the first `count` exemplars of every class: the memory's order within a class is its rank order."""
    kept = [(memory.labels == label).nonzero().squeeze(1)[:count] for label in range(len(memory.class_names))]
    return memory.subset(torch.cat(kept))


def balanced_subset(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Return positions of a class-balanced subset: of every class as many images as the scarcest class has.

    Args:
        labels: (N,) int64.
        generator: decides which images of the larger classes are taken.
    """
    rows = [(labels == label).nonzero().squeeze(1) for label in sorted(set(labels.tolist()))]
    size = min(len(row) for row in rows)
    return torch.cat([row[torch.randperm(len(row), generator=generator)[:size]].sort().values for row in rows])
