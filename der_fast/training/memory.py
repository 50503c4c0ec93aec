"""The rehearsal memory: which images of earlier classes are kept (iCaRL's herding), and how many."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from der_fast.config.schema import Config, MemoryConfig
from der_fast.data.source import ImageSource
from der_fast.errors import ConfigError, Spelling

_MOST_NAMED = 5


def quota(config: MemoryConfig, seen: int) -> int:
    """Return exemplars per class once `seen` classes are known: the fixed number, or total // seen."""
    return config.per_class if config.per_class is not None else config.total // seen


def check_quota(config: MemoryConfig, seen: int) -> None:
    """Refuse a memory that is too small for one exemplar of each of `seen` classes: it would be empty.

    Raises:
        ConfigError: the quota is 0 although `memory.total` is above 0.
    """
    if config.per_class is None and 0 < config.total < seen:
        raise ConfigError(
            f"memory.total = {config.total} leaves no exemplar for each of {seen} classes; use at least {seen} (",
            Spelling("--memory", "memory.total"),
            "), or a number per class (",
            Spelling("--memory-per-class", "memory.per_class"),
            "), or 0 for no memory at all",
        )


def scarcity_note(config: Config, images: Mapping[str, int], seen: int) -> str | None:
    """Return a note about classes with fewer images than their quota, or with a single one; None if there are none.

    Args:
        config: its memory and classifier stage count.
        images: number of training images by class name.
        seen: number of classes that share the memory.
    """
    count = quota(config.memory, seen)
    few = sorted((number, name) for name, number in images.items() if number < max(count, 2))
    if not few:
        return None
    named = ", ".join(f"{name!r} ({number})" for number, name in few[:_MOST_NAMED]) + (", …" if len(few) > _MOST_NAMED else "")
    note = f"{len(few)} class(es) have fewer training images than {f'their memory quota of {count}' if count > 1 else '2'}: {named}. "
    if config.classifier.epochs:
        note += f"All are kept, but the classifier stage takes only {few[0][0]} of every class, as many as the scarcest has. "
    else:
        note += "All are kept. "
    return note + "Add images of these classes, or leave them out."


def herding(features: Tensor, count: int) -> Tensor:
    """Return the positions of the `count` best exemplars of one class, best first (Rebuffi et al. 2017; eq. 15).

    With L2-normalised rows d_i and mean μ, it picks argmax ⟨w, d_i⟩ and sets w ← w + μ − d_i, starting from w = μ. The order is a
    ranking: a smaller count gives a prefix.

    Args:
        features: (n, F), any floating dtype; normalised here.
        count: number of exemplars; at most n are returned.
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
    """Return positions of a class-balanced subset: every class contributes as many images as the scarcest class has.

    Args:
        labels: (N,) int64.
        generator: decides which images of the larger classes are used.
    """
    rows = [(labels == label).nonzero().squeeze(1) for label in sorted(set(labels.tolist()))]
    size = min(len(row) for row in rows)
    return torch.cat([row[torch.randperm(len(row), generator=generator)[:size]].sort().values for row in rows])
