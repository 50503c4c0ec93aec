"""Dealing images out to processes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from der_fast.config.schema import DataConfig
from der_fast.data import MemorySource, transforms_for
from der_fast.data.catalogue.file_table import FileTable
from der_fast.data.photos import PhotoSource
from der_fast.data.read.walk import Loaded
from der_fast.data.shards import shard_of
from der_fast.seeds import generator


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


class Blank:
    """A library that reads nothing, and finds everything sound."""

    broken, notes, digests = {}, [], {}

    def read(self, walk):
        for number, positions in walk.rest:
            yield Loaded(torch.zeros(len(positions), *walk.transform.size, 3), positions, number)


def source_of(kind, new, memory):
    """Images of one class, the last of which were put behind the others as a rehearsal memory is; and their transform."""
    labels = torch.zeros(new + memory, dtype=torch.int64)
    if kind == "files":
        config = DataConfig(random_resized_crop=True, image_size=4)
        count = new + memory
        table = FileTable.of(
            "/nowhere", [""], np.zeros(count, np.int64), [b"%d.jpg" % row for row in range(count)], np.ones(count, np.int64)
        )
        whole = PhotoSource.of(table, np.arange(count), labels, ["a"], (5, 5), Blank())
    else:
        config = DataConfig(random_resized_crop=kind == "photos in memory", image_size=4, crop_padding=1)
        side = 5 if config.random_resized_crop else 4
        pixels = torch.randint(0, 256, (new + memory, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
        whole = MemorySource(pixels, labels, ["a"])
    parts = [whole.subset(torch.arange(new)), whole.subset(torch.arange(new, new + memory))]
    return parts[0].concatenated(parts[1]), transforms_for(config, whole.image_size)[0]


def by_index(batches):
    return {int(index): image for batch in batches for index, image in zip(batch.indices, batch.images, strict=True)}


def epoch_of(source, transform, batch_size, number, **keywords):
    return list(source.batches(None, batch_size, transform=transform, generator=generator(1, number), shuffle=True, **keywords))


@pytest.mark.parametrize("kind", ["small images", "photos in memory", "files"])
@settings(derandomize=True, deadline=None, max_examples=25)
@given(st.integers(1, 30), st.integers(0, 20), st.integers(2, 5), st.integers(2, 7))
def test_every_source_deals_its_epochs_out(kind, new, memory, world, batch_size):
    source, transform = source_of(kind, new, memory)
    if len(source) < world:
        with pytest.raises(ValueError, match="start fewer"):
            epoch_of(source.sharded(0, world), transform, batch_size, 0)
        return
    share = len(source) // world
    # A last batch of a single image is left out, unless it is the only one.
    read = share - (share % batch_size == 1 and share > batch_size)
    parts = [epoch_of(source.sharded(rank, world), transform, batch_size, 0) for rank in range(world)]
    sizes = [[len(batch.indices) for batch in part] for part in parts]
    assert all(own == sizes[0] for own in sizes) and sum(sizes[0]) == read
    seen = [index for part in parts for batch in part for index in batch.indices.tolist()]
    assert len(seen) == len(set(seen)) == read * world
    held = [sum(int((batch.indices >= new).sum()) for batch in part) for part in parts]
    assert max(held) - min(held) <= 1 + share - read
    # An image is cut and mirrored as it would be by one process that reads all of them.
    whole = by_index(epoch_of(source, transform, batch_size, 0))
    for index, image in by_index(batch for part in parts for batch in part).items():
        assert index not in whole or torch.equal(image, whole[index])


@pytest.mark.parametrize("kind", ["small images", "photos in memory", "files"])
def test_a_shard_goes_on_in_its_middle_and_epochs_are_dealt_out_again(kind):
    source, transform = source_of(kind, 20, 9)
    shards = [source.sharded(rank, 3) for rank in range(3)]
    for shard in shards:
        part = epoch_of(shard, transform, 4, 0)
        for number, batch in enumerate(part, 1):
            rest = epoch_of(shard, transform, 4, 0, start=batch.place)
            assert len(rest) == len(part) - number
            assert all(
                torch.equal(a.images, b.images) and torch.equal(a.indices, b.indices) for a, b in zip(rest, part[number:], strict=True)
            )
    dealt = [{tuple(sorted(torch.cat([b.indices for b in epoch_of(shard, transform, 4, n)]).tolist())) for shard in shards} for n in (0, 1)]
    assert not dealt[0] & dealt[1]


def test_processes_draw_other_windows_of_photos_in_memory():
    source, transform = source_of("photos in memory", 24, 0)
    # Were all images alike, equal windows would give equal batches.
    same = MemorySource(source.images[:1].expand(24, -1, -1, -1), source.labels, source.class_names)
    one, other = (torch.cat([batch.images for batch in epoch_of(same.sharded(rank, 2), transform, 6, 0)]) for rank in (0, 1))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", ["small images", "files"])
def test_a_shard_stays_one_and_reads_everything_for_a_test(kind):
    source, transform = source_of(kind, 8, 4)
    for part in (
        source.sharded(1, 3).relabelled(["b", "a"]),
        source.sharded(1, 3).of_classes(["a"]),
        source.sharded(1, 3).subset(torch.arange(12)),
        source.subset(torch.arange(8)).sharded(1, 3).concatenated(source.subset(torch.arange(8, 12))),
    ):
        assert (part.rank, part.world, part.groups.tolist(), len(part)) == (1, 3, [0] * 8 + [1] * 4, 12)
        assert sum(len(batch.indices) for batch in epoch_of(part, transform, 4, 0)) == 4
        assert sum(len(batch.indices) for batch in part.batches(None, 4, transform=transform, generator=generator(1))) == 12
    assert (source.rank, source.world) == (0, 1) and part.fingerprint() == source.fingerprint()
    with pytest.raises(ValueError, match="no process 3 of 3"):
        source.sharded(3, 3)


@pytest.mark.parametrize("kind", ["small images", "files"])
def test_what_is_put_behind_is_one_group_however_it_was_made(kind):
    """A rehearsal memory is put together class by class, for more classes than a byte counts."""
    source, _ = source_of(kind, 2, 0)
    memory = source
    for _ in range(300):
        memory = memory.concatenated(source)
    assert int(memory.groups.max()) == 300
    assert source.concatenated(memory).groups.tolist() == [0, 0] + [1] * 602
