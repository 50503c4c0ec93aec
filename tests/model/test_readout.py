"""The one rule by which classifiers are used at test time, against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from der_fast.model.readout import Readout, linear_readout


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_a_linear_layer_reads_as_it_did():
    layer = nn.Linear(5, 3)
    features = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    readout = linear_readout(layer, 5.0)
    assert torch.equal(readout(features), layer(features))
    assert torch.equal(readout.probabilities(readout(features)), torch.softmax(layer(features) / 5, 1))
    assert (readout.classes, readout.features, readout.parameters) == (3, 5, 18)
    assert not readout(features).requires_grad


def test_nearest_class_means():
    # Exemplars (1,0), (.6,.8) and (0,1), (1,.2): the unit means, and the squared distances of (3,1)/√10 from them.
    means = rows((0.894427, 0.447214), (0.633989, 0.773342))
    readout = Readout(means, torch.zeros(2, dtype=torch.float64), normalise=True, temperature=0.5)
    feature = rows((3.0, 1.0))
    scores = readout(feature)
    assert scores[0].tolist() == pytest.approx([3.130495 / 10**0.5, 2.675309 / 10**0.5], abs=1e-6)
    distances = ((feature / 10**0.5 - means) ** 2).sum(1)
    assert distances.tolist() == pytest.approx([0.020101, 0.307986], abs=1e-6)
    assert torch.allclose(readout.probabilities(scores), torch.softmax(-distances, 0)[None], atol=1e-5)


def test_length_does_not_matter_to_a_cosine_classifier():
    readout = Readout(rows((1, 0), (0.6, 0.8)), torch.zeros(2, dtype=torch.float64), normalise=True, temperature=0.25)
    assert torch.allclose(readout(rows((3, 4))), readout(rows((30, 40))))
    assert readout(rows((3, 4)))[0].tolist() == pytest.approx([0.6, 1.0])
    # A feature of zeros has no direction: every score is the bias.
    assert readout(rows((0, 0)))[0].tolist() == [0, 0]


def test_proxies_are_averaged_by_their_own_softmax():
    # Proxies of class 0 score 1 and 0, of class 1 both 0.5.
    readout = Readout(rows((1, 0), (0, 1), (0.5, 0), (0.5, 0)), torch.zeros(4, dtype=torch.float64), proxies=2)
    share = float(torch.sigmoid(torch.tensor(1.0, dtype=torch.float64)))
    assert readout(rows((1, 0)))[0].tolist() == pytest.approx([share, 0.5])
    assert (readout.classes, readout.parameters) == (2, 12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": torch.zeros(3)}, r"not \(4, 2\) and \(3,\) with 1 proxies"),
        ({"proxies": 3}, "with 3 proxies"),
        ({"proxies": 0}, "with 0 proxies"),
        ({"weight": torch.zeros(4)}, r"not \(4,\)"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"temperature": float("nan")}, "temperature must be above 0"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Readout(**{"weight": torch.zeros(4, 2), "bias": torch.zeros(4), **changes})
