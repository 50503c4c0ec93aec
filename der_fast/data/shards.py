"""Dividing an epoch's images among the processes of a run."""

from __future__ import annotations

import torch
from torch import Tensor


def check_process(rank: int, world: int) -> None:
    """Refuse a process number that does not exist; raises ValueError."""
    if not 0 <= rank < world:
        raise ValueError(f"there is no process {rank} of {world}: they are numbered from 0")


def shard_of(order: Tensor, groups: Tensor, rank: int, world: int) -> Tensor:
    """Return the images of an epoch that process `rank` of `world` reads, in the epoch's order.

    All processes get the same number of images, no image goes to two, and the numbers per group (new images, rehearsal memory) differ by at
    most one. Images that cannot be divided evenly, fewer than there are processes, are left out of this epoch.

    Args:
        order: (n,) int64: positions of images in the epoch's order.
        groups: (N,) integers: the group of every image of the source.
        rank, world: this process's number, and how many there are.

    Raises:
        ValueError: no such process, or fewer images than processes.
    """
    check_process(rank, world)
    if world == 1:
        return order
    share = len(order) // world
    if share == 0:
        raise ValueError(f"{len(order)} image(s) cannot be divided among {world} processes; start fewer")
    # Group after group, in turn: a group continues where the one before ended, so that all shares stay equal.
    by_group = groups[order].argsort(stable=True)[: share * world]
    return order[by_group[rank::world].sort().values]


def shuffled(order: Tensor, generator: torch.Generator, batch_size: int, groups: Tensor, rank: int = 0, world: int = 1) -> Tensor:
    """Return an epoch's images in a new order, those of one process; see `ImageSource.batches` and `shard_of`.

    A last batch of a single image is left out if it is not the only one, because batch-norm cannot train on one value.

    Args:
        order: (n,) int64: positions of images.
        generator: decides the order.
        batch_size: images per batch.
        groups, rank, world: see `shard_of`.
    """
    order = shard_of(order[torch.randperm(len(order), generator=generator)], groups, rank, world)
    return order[:-1] if len(order) > batch_size > 1 == len(order) % batch_size else order
