from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from der_fast.config.schema import Config, MemoryConfig
from der_fast.config.tree import replace_keys
from der_fast.data import MemorySource
from der_fast.errors import ConfigError
from der_fast.training.memory import balanced_subset, check_quota, herding, quota, scarcity_note, truncate


def rows_of(count: int, width: int, seed: int, *, repeats: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, width, generator=generator)
    return rows[torch.randint(0, count, (count,), generator=generator)] if repeats else rows


def scores_of(features: list[list[float]], chosen: list[int]) -> list[float]:
    """⟨w, d_i⟩ of every exemplar after `chosen` were taken, written out one number at a time."""
    lengths = [math.sqrt(sum(x * x for x in row)) for row in features]
    unit = [[x / length for x in row] for row, length in zip(features, lengths, strict=True)]
    mean = [sum(column) / len(unit) for column in zip(*unit, strict=True)]
    wanted = list(mean)
    for taken in chosen:
        wanted = [w + m - d for w, m, d in zip(wanted, mean, unit[taken], strict=True)]
    return [sum(w * d for w, d in zip(wanted, row, strict=True)) for row in unit]


@given(count=st.integers(1, 12), width=st.integers(1, 6), wanted=st.integers(0, 14), seed=st.integers(0, 10**6), repeats=st.booleans())
def test_herding_takes_the_best_of_what_is_left_every_time(count: int, width: int, wanted: int, seed: int, repeats: bool) -> None:
    features = rows_of(count, width, seed, repeats=repeats)
    chosen = herding(features, wanted).tolist()
    assert len(chosen) == len(set(chosen)) == min(count, wanted)
    for number, index in enumerate(chosen):
        scores = scores_of(features.double().tolist(), chosen[:number])
        best = max(score for other, score in enumerate(scores) if other not in chosen[:number])
        # Two exemplars may be equally good but for rounding.
        assert scores[index] == pytest.approx(best, abs=1e-9)


@given(count=st.integers(1, 20), small=st.integers(0, 20), large=st.integers(0, 20), seed=st.integers(0, 10**6))
def test_a_smaller_quota_is_a_prefix(count: int, small: int, large: int, seed: int) -> None:
    features = rows_of(count, 5, seed)
    small, large = sorted((small, large))
    assert herding(features, large)[:small].tolist() == herding(features, small).tolist()


def test_herding_does_not_mind_the_length_of_features() -> None:
    features = rows_of(10, 4, 3)
    stretched = features * torch.linspace(0.1, 50, 10)[:, None]
    assert herding(features, 10).tolist() == herding(stretched, 10).tolist()


def test_herding_by_hand() -> None:
    # Unit vectors at 0°, 40° and 100°: the mean points to about 46°, so 40° comes first; then w = 2μ − d₂, of about 57°,
    # is 43° from 100° and 57° from 0°.
    angles = torch.tensor([0.0, 40.0, 100.0]).deg2rad()
    assert herding(torch.stack([angles.cos(), angles.sin()], 1), 3).tolist() == [1, 2, 0]


def test_features_without_any_entry_are_taken_in_their_order() -> None:
    assert herding(torch.zeros(4, 0), 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("config", "seen", "count"),
    [
        (MemoryConfig(total=2000), 10, 200),
        (MemoryConfig(total=2000), 30, 66),
        (MemoryConfig(total=0), 5, 0),
        (MemoryConfig(total=3), 4, 0),
        (MemoryConfig(total=2000, per_class=20), 50, 20),
        (MemoryConfig(total=2000, per_class=0), 50, 0),
    ],
)
def test_quota(config: MemoryConfig, seen: int, count: int) -> None:
    assert quota(config, seen) == count


@pytest.mark.parametrize(
    ("config", "seen"),
    [(MemoryConfig(total=0), 5), (MemoryConfig(total=5), 5), (MemoryConfig(total=3, per_class=2), 5), (MemoryConfig(per_class=0), 5)],
)
def test_memories_with_room_for_every_class_or_for_none_by_wish(config: MemoryConfig, seen: int) -> None:
    check_quota(config, seen)


def test_a_memory_without_room_for_every_class_is_refused() -> None:
    with pytest.raises(ConfigError, match="memory.total = 4 leaves no exemplar for each of 5 classes; use at least 5"):
        check_quota(MemoryConfig(total=4), 5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "2 class(es) have fewer training images than their memory quota of 5: 'b' (1), 'a' (3). All are kept, but the classifier "
             "stage takes only 1 of every class, as many as the scarcest has. Add images of these classes, or leave them out."),
        ({"classifier.epochs": 0}, "(3). All are kept. Add images"),
        # A single image is too little whatever the memory.
        ({"memory.total": 0}, "1 class(es) have fewer training images than 2: 'b' (1). All"),
        ({"memory.per_class": 1}, "fewer training images than 2: 'b' (1)"),
        ({"memory.per_class": 3}, "1 class(es) have fewer training images than their memory quota of 3: 'b' (1)"),
    ],
)  # fmt: skip
def test_scarce_classes_are_named_with_what_follows(changes: dict[str, Any], words: str) -> None:
    config = replace_keys(Config(), {"memory.total": 20, **changes})
    assert words in str(scarcity_note(config, {"a": 3, "b": 1, "c": 9}, 4))
    assert scarcity_note(config, {"c": 9}, 4) is None


@given(labels=st.lists(st.integers(0, 3), min_size=1, max_size=30), count=st.integers(0, 12))
def test_truncate_keeps_the_first_of_every_class(labels: list[int], count: int) -> None:
    images = torch.arange(len(labels), dtype=torch.uint8)[:, None, None, None].expand(-1, 2, 2, 3)
    memory = truncate(MemorySource(images, torch.tensor(labels), "abcd"), count)
    for label in range(4):
        before = [index for index, own in enumerate(labels) if own == label]
        assert memory.images[memory.labels == label][:, 0, 0, 0].tolist() == before[:count]
    assert memory.class_names == ("a", "b", "c", "d")


@given(labels=st.lists(st.integers(0, 5), min_size=1, max_size=40), seed=st.integers(0, 1000))
def test_balanced_subset(labels: list[int], seed: int) -> None:
    tensor = torch.tensor(labels)
    chosen = balanced_subset(tensor, torch.Generator().manual_seed(seed))
    assert len(chosen.unique()) == len(chosen)
    scarcest = min(labels.count(label) for label in set(labels))
    assert tensor[chosen].bincount(minlength=6).tolist() == [scarcest if label in labels else 0 for label in range(6)]
    assert chosen.tolist() == balanced_subset(tensor, torch.Generator().manual_seed(seed)).tolist()


def test_the_subset_depends_on_the_generator(synthetic: Callable[..., MemorySource]) -> None:
    labels = torch.tensor([0] * 50 + [1] * 5)
    drawn = {tuple(balanced_subset(labels, torch.Generator().manual_seed(seed)).tolist()) for seed in range(5)}
    assert len(drawn) == 5
