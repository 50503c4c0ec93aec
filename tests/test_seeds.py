from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from der_fast.seeds import derive_seed, generator

names = st.lists(st.one_of(st.integers(0, 10**6), st.sampled_from(["augment", "subset", "classifier", ""])), max_size=4)


# Written down once: if they change, a run that another version began can no longer be resumed.
@pytest.mark.parametrize(
    ("seed", "parts", "value"),
    [(1993, (), 5132090518032153085), (1993, ("class order",), 8664173790740852201), (7, ("representation", 2, 13), 7878586497466514818)],
)
def test_seeds_stay_what_they_are(seed: int, parts: tuple[str | int, ...], value: int) -> None:
    assert derive_seed(seed, *parts) == value


@settings(deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**63 - 1), parts=names)
def test_a_seed_fits_into_a_generator(seed: int, parts: list[str | int]) -> None:
    value = derive_seed(seed, *parts)
    assert 0 <= value < 2**63
    assert torch.equal(torch.rand(3, generator=generator(seed, *parts)), torch.rand(3, generator=torch.Generator().manual_seed(value)))


def test_every_part_and_its_place_count() -> None:
    calls = [(1,), (2,), (1, "a"), (1, "b"), (1, "a", 1), (1, "a", 2), (1, 1, "a"), (1, "a1"), (11, "a"), (1, "a", 1, 1), (1, "a", 11)]
    assert len({derive_seed(*call) for call in calls}) == len(calls)


def test_the_global_state_is_neither_read_nor_changed() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = torch.rand(4, generator=generator(5, "x"))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(4, generator=generator(5, "x")), first)
