"""Dealing images out to processes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from der_fast.data.shards import shard_of


@settings(derandomize=True, deadline=None)
@given(st.integers(1, 60), st.integers(0, 40), st.integers(1, 7), st.integers(0, 100))
def test_equal_parts_without_repeats_and_memory_is_split_fairly(new, memory, world, seed):
    groups = torch.cat([torch.zeros(new), torch.ones(memory)]).to(torch.int8)
    order = torch.randperm(new + memory, generator=torch.Generator().manual_seed(seed))
    if len(order) < world:
        with pytest.raises(ValueError, match="start fewer"):
            shard_of(order, groups, 0, world)
        return
    parts = [shard_of(order, groups, rank, world) for rank in range(world)]
    assert {len(part) for part in parts} == {len(order) // world}
    together = torch.cat(parts).tolist()
    assert len(together) == len(set(together)) and set(together) <= set(order.tolist())
    for group in (0, 1):
        counts = [int((groups[part] == group).sum()) for part in parts]
        assert max(counts) - min(counts) <= 1
    place = {position: index for index, position in enumerate(order.tolist())}
    assert all([place[entry] for entry in part.tolist()] == sorted(place[entry] for entry in part.tolist()) for part in parts)


def test_one_process_reads_everything_in_order():
    order = torch.tensor([2, 0, 1])
    assert shard_of(order, torch.zeros(3), 0, 1).tolist() == [2, 0, 1]


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_process_that_is_none(rank):
    with pytest.raises(ValueError, match="no process"):
        shard_of(torch.arange(4), torch.zeros(4), rank, 2)
