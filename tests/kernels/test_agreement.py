"""Before the fastest way is taken, every way must compute what the trusted one does."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from der_fast.kernels import choices
from der_fast.kernels.agreement import LARGEST, agreeing, difference
from der_fast.kernels.choices import Choices


def values(dtype=torch.float32, count=1000):
    return torch.randn(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def whole(result):
    return [result]


def test_the_difference_is_relative_to_the_trusted_result():
    one = values(torch.float64)
    assert difference(one, one) == 0.0
    assert difference(1.01 * one, one) == pytest.approx(0.01)
    assert difference(one[:10], one) == math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_number_that_is_not_finite_is_a_difference(bad):
    one = values()
    other = one.clone()
    other[3] = bad
    assert difference(other, one) == difference(one, other) == math.inf
    # A loss that has diverged is no fault of the way that computes it.
    assert difference(other, other.clone()) == 0.0


@pytest.mark.parametrize("dtype", LARGEST)
def test_what_is_wrong_is_left_out_and_what_only_rounds_is_kept(dtype, caplog):
    truth = values(dtype)
    allowed = LARGEST[dtype]
    runs = {
        "right": lambda: truth,
        "rounded": lambda: (truth.double() * (1 + 0.5 * allowed)).to(dtype),
        "wrong": lambda: (truth.double() * (1 + 1.5 * allowed)).to(dtype),
    }
    with caplog.at_level(logging.WARNING):
        assert list(agreeing(runs, "right", whole, "sums run as")) == ["right", "rounded"]
    (record,) = caplog.records
    assert "sums run as 'wrong' is not used, because it computes something else (it differs by" in record.getMessage()


def test_one_tile_that_is_not_written_is_found():
    truth = values(torch.bfloat16, 128 * 128).view(128, 128)
    hole = truth.clone()
    hole[64:80, 64:80] = 0
    assert list(agreeing({"right": lambda: truth, "hole": lambda: hole}, "right", whole, "")) == ["right"]


def test_a_way_that_fails_or_gives_nothing_is_left_out(caplog):
    def fail():
        raise RuntimeError("out of shared memory")

    with caplog.at_level(logging.WARNING):
        assert list(agreeing({"right": values, "bad": fail, "none": lambda: None}, "right", whole, "sums run as")) == ["right"]
    assert "'bad' is not used, because it failed: RuntimeError: out of shared memory" in caplog.text
    assert "'none' is not used, because it returns a gradient where there should be none, or none where there should be one" in caplog.text


def test_the_trusted_result_may_be_overwritten_by_the_next_run():
    buffer = torch.empty(4)
    runs = {"right": lambda: buffer.fill_(1.0), "wrong": lambda: buffer.fill_(2.0)}
    assert list(agreeing(runs, "right", whole, "")) == ["right"]


def test_the_fastest_wrong_answer_is_not_chosen(monkeypatch):
    monkeypatch.setattr(choices, "measure", lambda runs, device: {name: {"right": 2.0, "wrong": 1.0}[name] for name in runs})
    runs = {"right": values, "wrong": lambda: 2 * values()}
    assert Choices().fastest("key", runs) == "wrong"
    assert Choices().fastest("key", runs, trusted="right", tensors=whole) == "right"
