"""The frozen bank of compact extractors: one forward, no gradients, the weights once."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from der_fast.compaction.bank import FrozenBank
from der_fast.compaction.bank.execute import execute
from der_fast.compaction.bank.extractor import CompactExtractor
from der_fast.compaction.bank.strategies import STRATEGIES
from der_fast.errors import ConfigError
from der_fast.kernels import timing
from der_fast.kernels.choices import Choices


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch):
    monkeypatch.setattr(timing, "BUDGET", 0.002)


@pytest.fixture
def mixed(arena_of):
    """Different backbones, masks and widths, one of them with nothing left."""
    return [
        arena_of("resnet18", "most", width=4),
        arena_of("resnet20", "few", width=6, seed=1),
        arena_of("resnet20", "nothing"),
        arena_of("preact_resnet18", "lost", width=3, seed=2),
        arena_of("resnet18", "one", width=4, seed=5),
    ]


def bank_of(arenas, **options):
    return FrozenBank([CompactExtractor(arena) for arena in arenas], choices=Choices(), **options)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_features_stand_side_by_side_in_order(mixed, pictures, strategy):
    bank, images = bank_of(mixed, strategy=strategy), pictures(19)
    expected = torch.cat([execute(arena.ops, arena.tensors(), images) for arena in mixed], 1)
    found = bank(images)
    assert bank.widths == [arena.features for arena in mixed] and bank.features == found.shape[1] == expected.shape[1]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    assert bank.parameter_counts() == [arena.parameters for arena in mixed] and bank.parameter_counts()[2] == 0


def test_the_choice_is_recorded_and_followed(mixed, pictures):
    bank, images = bank_of(mixed[:1]), pictures(19)
    bank(images)
    (key, chosen), *others = bank.choices.record().items()
    assert not others and chosen in STRATEGIES[1:] and "resnet18" in key
    for strategy in STRATEGIES[1:]:
        pinned = bank_of(mixed[:1])
        pinned.choices.pin({key: strategy})
        assert torch.equal(pinned(images), bank_of(mixed[:1], strategy=strategy)(images))


def test_unknown_strategy():
    with pytest.raises(ConfigError, match="unknown strategy 'fast': choose from auto"):
        FrozenBank(strategy="fast")


def test_a_dense_extractor_stands_beside_compact_ones(network_of, mixed, pictures):
    dense, images = network_of("resnet20", width=2), pictures(3)
    expected = dense(images).detach()
    bank = FrozenBank([CompactExtractor(mixed[0]), dense, CompactExtractor(mixed[1])], choices=Choices())
    found = bank(images)
    first, second, third = bank.widths
    assert torch.equal(found[:, first : first + second], expected) and found.shape == (3, first + second + third)
    assert not any(parameter.requires_grad for parameter in bank.parameters())
    assert bank.parameter_counts()[1] == sum(parameter.numel() for parameter in dense.parameters())


def test_no_gradient_and_nothing_saved_for_one(mixed, pictures):
    bank, head = bank_of(mixed), nn.Linear(sum(arena.features for arena in mixed), 3)
    images = pictures(17).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        features = bank(images)
    assert saved == [] and not features.requires_grad and not features.is_inference()
    head(features).square().sum().backward()
    assert images.grad is None and bool((head.weight.grad != 0).any())


def test_no_parameters_no_buffers_no_state(mixed):
    bank = bank_of(mixed)
    assert not list(bank.parameters()) and not list(bank.buffers()) and not bank.state_dict()
    assert not any(module.training for module in bank.train().modules())


def test_autocast_does_not_change_the_dtype_of_the_weights(mixed, arena_of, pictures):
    images = pictures(4)
    bank = bank_of(mixed, strategy="plain")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(bank(images), bank_of(mixed, strategy="plain")(images))
    half = bank_of([arena_of("resnet18", "most", width=4, dtype=torch.bfloat16)])
    assert half(images).dtype == torch.bfloat16
    assert bank_of([mixed[0], half.extractors[0].arena])(images).dtype == torch.float32


def test_weights_share_memory_with_the_arena_even_after_a_copy(mixed, pictures):
    extractor, images = CompactExtractor(mixed[0]), pictures(2)
    twin = copy.deepcopy(extractor)
    revived = pickle.loads(pickle.dumps(extractor))
    for other in (extractor, twin, revived):
        begin = other.arena.storage.data_ptr()
        assert all(begin <= tensor.data_ptr() < begin + other.arena.nbytes for tensor in other.runnable.tensors.values())
    assert len({other.arena.storage.data_ptr() for other in (extractor, twin, revived)}) == 3
    assert len(pickle.dumps(extractor)) < 1.5 * extractor.arena.nbytes + 20_000
    bank = FrozenBank([extractor, twin, revived], strategy="plain")
    first, second, third = bank(images).chunk(3, 1)
    assert torch.equal(first, second) and torch.equal(first, third)


def test_casts_leave_the_weights_alone_and_moves_do_not(mixed, pictures):
    bank, images = bank_of(mixed, strategy="plain"), pictures(2)
    before = bank(images)
    storages = [extractor.arena.storage for extractor in bank.extractors]
    bank.to(torch.bfloat16).to(memory_format=torch.channels_last).to("cpu").double()
    assert all(extractor.arena.storage is storage for extractor, storage in zip(bank.extractors, storages, strict=True))
    assert torch.equal(bank(images), before)
    bank.to("meta")
    assert {extractor.runnable.device.type for extractor in bank.extractors} == {"meta"}
    assert all(tensor.is_meta for extractor in bank.extractors for tensor in extractor.runnable.tensors.values())


def test_one_extractor_alone(mixed, pictures):
    extractor, images = CompactExtractor(mixed[0]), pictures(3)
    assert extractor.features == mixed[0].features and extractor.widths == mixed[0].widths
    assert extractor.parameter_count == mixed[0].parameters and extractor.stored_parameters == mixed[0].stored_parameters
    expected = execute(mixed[0].ops, mixed[0].tensors(), images)
    torch.testing.assert_close(extractor(images), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    assert CompactExtractor(mixed[2])(images).shape == (3, 0)


def test_a_loaded_arena_runs_where_it_was_mapped(mixed, pictures, tmp_path):
    arena = mixed[0]
    loaded = type(arena).load(arena.save(tmp_path / "extractor.safetensors"))
    for strategy in STRATEGIES[1:]:
        assert torch.equal(bank_of([loaded], strategy=strategy)(pictures(3)), bank_of([arena], strategy=strategy)(pictures(3)))
    assert io.BytesIO(loaded.to_bytes()).getvalue() == arena.to_bytes()
