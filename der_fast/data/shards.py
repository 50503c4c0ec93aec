"""Dealing an epoch's images out to the processes of a run."""

from __future__ import annotations

from torch import Tensor


def check_process(rank: int, world: int) -> None:
    """Refuse a process that is none; raises ValueError."""
    if not 0 <= rank < world:
        raise ValueError(f"there is no process {rank} of {world}: they are numbered from 0")


def shard_of(order: Tensor, groups: Tensor, rank: int, world: int) -> Tensor:
    """Return what process `rank` of `world` reads of an epoch, in its order.

    Every process gets equally many images, no image goes to two, and of every group (new images, rehearsal memory) each gets equally
    many but for one. What cannot be dealt out evenly, fewer images than there are processes, is left out of this epoch.

    Args:
        order: (n,) int64: positions of images in the epoch's order.
        groups: (N,) integers: the group of every image of the source.
        rank, world: which process of how many.

    Raises:
        ValueError: no such process, or fewer images than processes.
    """
    check_process(rank, world)
    if world == 1:
        return order
    share = len(order) // world
    if share == 0:
        raise ValueError(f"{len(order)} image(s) cannot be dealt out to {world} processes; start fewer")
    # Group after group, round and round: a group goes on where the one before ended, so that all hands stay equal.
    by_group = groups[order].argsort(stable=True)[: share * world]
    return order[by_group[rank::world].sort().values]
