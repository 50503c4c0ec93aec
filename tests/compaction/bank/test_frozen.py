"""The frozen bank: no gradient, evaluation mode, features side by side."""

from __future__ import annotations

import torch
from torch import nn

from der_fast.compaction.bank import FrozenBank
from der_fast.model.architecture import build_architecture
from der_fast.model.extractor import Extractor


def extractor(seed, width=2, backbone="resnet20"):
    return Extractor(build_architecture(backbone, width=width)).initialise(torch.Generator().manual_seed(seed))


def images(count=4):
    return torch.randn(count, 3, 12, 10, generator=torch.Generator().manual_seed(9))


def test_features_stand_side_by_side_in_order():
    members = [extractor(0, width=1), extractor(1, width=3), extractor(2, width=2, backbone="resnet18")]
    expected = [member.eval()(images()).detach() for member in members]
    bank = FrozenBank(members[:2])
    bank.append(members[2])
    assert len(bank) == 3
    assert bank.widths == [4, 12, 16] and bank.features == 32
    assert torch.equal(bank(images()), torch.cat(expected, 1))
    assert bank.parameter_counts() == [sum(p.numel() for p in member.parameters()) for member in members]


def test_empty_bank():
    bank = FrozenBank()
    assert (len(bank), bank.features, bank.widths, bank.parameter_counts()) == (0, 0, [], [])
    assert bank(images(3)).shape == (3, 0)


def test_an_extractor_of_width_zero_adds_nothing():
    architecture = build_architecture("resnet20", width=2)
    nothing = Extractor(architecture, dict.fromkeys(architecture.groups, 0))
    bank = FrozenBank([extractor(0), nothing, extractor(1)])
    assert bank.widths == [8, 0, 8] and bank.parameter_counts()[1] == 0
    assert torch.equal(bank(images()), FrozenBank([bank.extractors[0], bank.extractors[2]])(images()))


def test_training_mode_does_not_reach_the_members():
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.bank = FrozenBank([extractor(0).train()])
            self.head = nn.Linear(8, 2)

    whole = Whole()
    for mode in (True, False, True):
        whole.train(mode)
        assert whole.head.training is mode
        assert not any(module.training for module in whole.bank.modules())
    before = {name: value.clone() for name, value in whole.bank.state_dict().items()}
    first = whole.bank(images())
    assert torch.equal(whole.bank(images()), first)
    assert all(torch.equal(value, before[name]) for name, value in whole.bank.state_dict().items())


def test_no_gradient_reaches_the_members_but_the_head_learns():
    bank, head = FrozenBank([extractor(0), extractor(1)]), nn.Linear(16, 3)
    assert not any(parameter.requires_grad for parameter in bank.parameters())
    batch = images().requires_grad_()
    features = bank(batch)
    assert not features.requires_grad
    head(features).square().sum().backward()
    assert batch.grad is None
    assert all(parameter.grad is None for parameter in bank.parameters())
    assert bool((head.weight.grad != 0).any())
