"""The classifiers: how they start, grow and shrink."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from der_fast.model.classifier import (
    auxiliary_targets,
    grow_classifier,
    initialise_classifier,
    keep_classes,
    new_classifier,
    slice_classifier,
    spread_classifier,
)


def seeded(number=0):
    return torch.Generator().manual_seed(number)


def test_entries_are_uniform_within_one_over_root_features():
    layer = new_classifier(64, 200, seeded())
    for entries in (layer.weight.detach().flatten(), layer.bias.detach()):
        scaled = (entries * math.sqrt(64)).sort().values
        assert float(scaled.abs().max()) <= 1
        expected = torch.linspace(-1, 1, len(scaled))
        assert float((scaled - expected).abs().max()) / 2 < 2.7 / len(scaled) ** 0.5


def test_entries_come_from_the_generator_alone():
    torch.manual_seed(1)
    first = new_classifier(5, 3, seeded(4))
    torch.manual_seed(2)
    second = new_classifier(5, 3, seeded(4))
    assert torch.equal(first.weight, second.weight) and torch.equal(first.bias, second.bias)
    assert not torch.equal(new_classifier(5, 3, seeded(5)).weight, first.weight)


def test_initialise_draws_anew_in_place():
    layer = new_classifier(5, 3, seeded(4))
    weight, expected = layer.weight, new_classifier(5, 3, seeded(7))
    initialise_classifier(layer, seeded(7))
    assert layer.weight is weight and layer.weight.requires_grad
    assert torch.equal(layer.weight, expected.weight) and torch.equal(layer.bias, expected.bias)


def test_growing_keeps_what_the_old_one_says_about_old_features():
    old = new_classifier(6, 4, seeded(0))
    grown = grow_classifier(old, 10, 7, seeded(1))
    features = torch.randn(5, 6, generator=seeded(2))
    padded = torch.cat([features, torch.zeros(5, 4)], 1)
    torch.testing.assert_close(grown(padded)[:, :4], old(features))
    fresh = new_classifier(10, 7, seeded(1))
    assert torch.equal(grown.weight[4:], fresh.weight[4:]) and torch.equal(grown.weight[:, 6:], fresh.weight[:, 6:])
    assert torch.equal(grown.bias[4:], fresh.bias[4:])
    assert grown.weight.requires_grad


def test_growing_from_nothing_is_a_new_classifier():
    grown, fresh = grow_classifier(None, 4, 3, seeded(1)), new_classifier(4, 3, seeded(1))
    assert torch.equal(grown.weight, fresh.weight) and torch.equal(grown.bias, fresh.bias)


def test_growing_leaves_the_old_one_alone():
    old = new_classifier(6, 4, seeded(0))
    weight = old.weight.detach().clone()
    grown = grow_classifier(old, 10, 7, seeded(1))
    with torch.no_grad():
        grown.weight.zero_()
    assert torch.equal(old.weight, weight)


def test_spread_inputs_are_read_and_all_others_ignored():
    layer, columns = new_classifier(3, 4, seeded(0)).double(), torch.tensor([0, 2, 5])
    spread = spread_classifier(layer, columns, 7)
    features = torch.randn(5, 7, generator=seeded(1), dtype=torch.float64)
    torch.testing.assert_close(spread(features), layer(features[:, columns]))
    assert spread.weight.count_nonzero() == layer.weight.count_nonzero() == 12
    again = slice_classifier(spread, torch.zeros(7, dtype=torch.bool).index_fill(0, columns, True))
    assert torch.equal(again.weight, layer.weight) and torch.equal(again.bias, layer.bias)


@pytest.mark.parametrize("kept", [(0, 3, 4), (), tuple(range(7))])
def test_a_slice_reads_the_kept_features_only(kept):
    layer, keep = new_classifier(7, 4, seeded(0)), torch.zeros(7, dtype=torch.bool)
    keep[list(kept)] = True
    features = torch.randn(5, 7, generator=seeded(1))
    sliced = slice_classifier(layer, keep)
    assert (sliced.in_features, sliced.out_features) == (len(kept), 4)
    torch.testing.assert_close(sliced(features[:, keep]), layer(features * keep))
    assert sliced.weight.requires_grad and sliced.bias.requires_grad


@pytest.mark.parametrize("kept", [(0, 3, 4), ()])
def test_constant_features_move_into_the_bias(kept):
    layer, keep = new_classifier(7, 4, seeded(0)), torch.zeros(7, dtype=torch.bool)
    keep[list(kept)] = True
    constant = torch.randn(7, generator=seeded(2))
    features = torch.where(keep, torch.randn(5, 7, generator=seeded(1)), constant)
    sliced = slice_classifier(layer, keep, constant)
    torch.testing.assert_close(sliced(features[:, keep]), layer(features))
    # Only the dropped ones are constant.
    assert torch.equal(slice_classifier(layer, keep, torch.where(keep, 1e6, constant)).bias, sliced.bias)


def test_slicing_leaves_the_layer_alone_and_keeps_its_dtype():
    layer = new_classifier(7, 4, seeded(0)).double()
    before = layer.weight.detach().clone(), layer.bias.detach().clone()
    sliced = slice_classifier(layer, torch.ones(7, dtype=torch.bool), torch.ones(7, dtype=torch.float64))
    assert sliced.weight.dtype == sliced.bias.dtype == torch.float64
    with torch.no_grad():
        sliced.weight.zero_()
        sliced.bias.zero_()
    assert torch.equal(layer.weight, before[0]) and torch.equal(layer.bias, before[1])


def test_no_features_without_a_murmur():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = new_classifier(0, 3, seeded(0))
        sliced = slice_classifier(new_classifier(4, 3, seeded(0)), torch.zeros(4, dtype=torch.bool))
    assert float(layer.bias.detach().abs().max()) <= 1
    assert layer(torch.zeros(2, 0)).shape == sliced(torch.zeros(2, 0)).shape == (2, 3)


def test_auxiliary_targets_put_all_old_classes_into_one():
    labels = torch.tensor([0, 4, 5, 9, 3, 7])
    assert auxiliary_targets(labels, 5).tolist() == [0, 0, 1, 5, 0, 3]
    assert labels.tolist() == [0, 4, 5, 9, 3, 7]
    assert auxiliary_targets(torch.tensor([0, 1]), 1).tolist() == [0, 1]


def test_some_classes_keep_their_weights():
    layer, features = new_classifier(6, 4, seeded(0)), torch.randn(5, 6, generator=seeded(1))
    kept = keep_classes(layer, torch.tensor([0, 3]))
    assert kept.out_features == 2
    assert torch.equal(kept.weight, layer.weight[[0, 3]]) and torch.equal(kept.bias, layer.bias[[0, 3]])
    # A product of another shape may be summed in another order.
    torch.testing.assert_close(kept(features), layer(features)[:, [0, 3]], rtol=0, atol=1e-5)
    with torch.no_grad():
        kept.weight.zero_()
    assert float(layer.weight.detach().abs().sum()) > 0
