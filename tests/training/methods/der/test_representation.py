from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from der_fast.compaction.bank import FrozenBank
from der_fast.config.schema import Config
from der_fast.data import MemorySource
from der_fast.model.architecture import build_architecture
from der_fast.model.classifier import auxiliary_targets, initialise_classifier
from der_fast.model.extractor import Extractor
from der_fast.seeds import generator
from der_fast.training.context import Context
from der_fast.training.methods.der.mask_log import FILE, MaskLog
from der_fast.training.methods.der.method import begin_step
from der_fast.training.methods.der.pruning import final_keep, kept_share
from der_fast.training.methods.der.representation import RepresentationStage
from der_fast.training.methods.der.state import DerState
from der_fast.training.model import Model, Network
from der_fast.training.packing import schedule_of
from der_fast.training.progress import Observer

Tiny = Callable[..., Config]
Images = Callable[..., MemorySource]
Contexts = Callable[..., Context]

FROZEN = 1


def second_step(context: Context) -> tuple[Model, DerState]:
    """A model with one (untrained) extractor of classes a and b, and the state in which the step of c and d begins."""
    architecture = build_architecture("resnet20", width=2)
    old = Extractor(architecture).initialise(torch.Generator().manual_seed(FROZEN))
    model = Model(Network(architecture, FrozenBank([old]), dense=old.state_dict()), class_sets=[("a", "b")])
    model.network.dense = {name: value.clone() for name, value in old.state_dict().items()}
    return model, begin_step(context, model, 2)


def stage_of(context: Context, source: MemorySource, state: DerState, model: Model) -> RepresentationStage:
    return RepresentationStage(context, state, model.network.bank, source, 2, schedule_of(context, state.step))


def snapshot(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(module: torch.nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


class Inspector(Observer):
    """Calls a function in the middle of the step, after every batch."""

    def __init__(self, look: Callable[[], None]) -> None:
        self.look, self.batches = look, 0

    def batch_ends(self, *event: Any) -> None:
        self.batches += 1
        self.look()


def test_frozen_extractors_are_left_alone(tiny: Tiny, synthetic: Images, context_for: Contexts) -> None:
    source = synthetic("abcd")

    def look() -> None:
        assert not any(module.training for extractor in model.network.bank.extractors for module in extractor.modules())
        assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.network.bank.parameters())
        assert state.extractor.training
        assert all(parameter.grad is not None for parameter in state.extractor.parameters())

    inspector = Inspector(look)
    context = context_for(tiny(), source, inspector)
    model, state = second_step(context)
    frozen, new = snapshot(model.network.bank), snapshot(state.extractor)
    stage_of(context, source, state, model).run()
    assert inspector.batches == 2 * 3
    assert same(model.network.bank, frozen)
    assert not same(state.extractor, new)


@pytest.mark.parametrize("warmup", [0, 1])
def test_both_classifiers_start_anew_at_the_end_of_the_warm_up(warmup: int, tiny: Tiny, synthetic: Images, context_for: Contexts) -> None:
    # With a vanishing learning rate a classifier stays what it started as.
    changes = {"later.warmup_epochs": warmup, "later.lr": 1e-9, "later.warmup_lr": 0.0, "later.momentum": 0.0, "masks.settle": 0.0}
    source = synthetic("abcd")
    context = context_for(tiny(changes), source)
    model, state = second_step(context)
    start = snapshot(state.head), snapshot(state.auxiliary)
    stage_of(context, source, state, model).run()
    for name, layer, before in (("head", state.head, start[0]), ("auxiliary", state.auxiliary, start[1])):
        wanted = torch.nn.Linear(layer.in_features, layer.out_features)
        initialise_classifier(wanted, generator(7, "after warm-up", name, 2))
        assert torch.allclose(layer.weight, wanted.weight if warmup else before["weight"], atol=1e-6)
        assert torch.allclose(layer.bias, wanted.bias if warmup else before["bias"], atol=1e-6)
        assert not torch.allclose(wanted.weight, before["weight"], atol=1e-2)


def test_step_1_has_no_auxiliary_classifier_and_step_2_one_of_the_new_classes(tiny: Tiny, synthetic: Images, context_for: Contexts) -> None:
    context = context_for(tiny(), synthetic("ab"))
    first = begin_step(context, Model(Network(build_architecture("resnet20", width=2))), 2)
    assert (first.step, first.auxiliary) == (1, None)
    _, second = second_step(context)
    assert second.auxiliary is not None
    assert (second.auxiliary.in_features, second.auxiliary.out_features) == (8, 3)
    assert (second.head.in_features, second.head.out_features) == (16, 4)


def test_auxiliary_targets_put_old_classes_together() -> None:
    assert auxiliary_targets(torch.tensor([0, 3, 1, 2, 5, 4]), 3).tolist() == [0, 1, 0, 0, 3, 2]
    assert auxiliary_targets(torch.tensor([0, 1]), 0).tolist() == [1, 2]


def test_the_auxiliary_loss_reaches_the_extractor(tiny: Tiny, synthetic: Images, context_for: Contexts) -> None:
    source = synthetic("abcd")
    weights = []
    for aux_weight in (0.0, 1.0, 3.0):
        context = context_for(tiny({"method.aux_weight": aux_weight}), source)
        model, state = second_step(context)
        assert (state.auxiliary is None) == (aux_weight == 0)
        stage_of(context, source, state, model).run()
        weights.append(state.extractor.stem.weight.detach().clone())
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])


def test_mask_logits_are_clamped(tiny: Tiny, synthetic: Images, context_for: Contexts) -> None:
    source = synthetic("abcd")
    context = context_for(tiny({"masks.lr": 1e4, "masks.clamp": 3.0, "masks.settle": 0.0}), source)
    model, state = second_step(context)
    stage_of(context, source, state, model).run()
    assert state.masks.logits.abs().max() == 3.0


def test_settled_epochs_leave_the_masks_alone(tiny: Tiny, synthetic: Images, context_for: Contexts) -> None:
    source = synthetic("abcd")
    context = context_for(tiny({"later.epochs": 4, "masks.settle": 0.5}), source)
    model, state = second_step(context)
    stage_of(context, source, state, model).run()
    assert [record.settled for record in state.records] == [False, False, True, True]
    # Three batches an epoch; no budget, so that the cut changes nothing.
    assert state.mask_log.times == pytest.approx([0, 1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2, 2])
    rows = state.mask_log.logits
    assert all(not torch.equal(one, other) for one, other in pairwise(rows[:-1]))
    assert torch.equal(rows[-2], rows[-1]) and torch.equal(rows[-1], state.masks.logits)
    assert state.mask_log.thresholds is not None and not state.mask_log.thresholds.any()


def test_a_target_is_met_before_the_masks_are_settled(tiny: Tiny, synthetic: Images, context_for: Contexts) -> None:
    source = synthetic("abcd")
    context = context_for(tiny({"masks.target_params": 0.3, "masks.floor": 0.0}), source)
    model, state = second_step(context)
    stage_of(context, source, state, model).run()
    share = kept_share(state.masks.layout, final_keep(state.masks, context.config.masks))
    assert state.records[-1].settled
    assert state.records[-1].kept_share == share <= 0.3
    log, layout = state.mask_log, state.masks.layout
    assert log.thresholds is not None and log.thresholds.max() > 0
    before, after = (layout.by_group(row) for row in log.logits[-2:])
    assert log.thresholds.tolist() == [
        pytest.approx(float((before[name] - after[name])[after[name] > 1e-6].mean()), abs=1e-5)
        if (after[name] > 1e-6).any()
        else pytest.approx(threshold)
        for name, threshold in zip(layout.names, log.thresholds.tolist(), strict=True)
    ]
    # A later cut finds the budget met; the log keeps what the first one asked for, also in a checkpoint.
    log = MaskLog.of(log.tensors())
    first = log.thresholds
    log.add(2.0, state.masks.logits, torch.zeros_like(first))
    assert torch.equal(log.thresholds, first) and set(state.files()[FILE][0]) == {"times", "logits", "offsets", "prices", "thresholds"}
    # The log of an earlier version has a cut without thresholds.
    old = MaskLog([0.0, 1.0, 1.0], [state.masks.logits.detach()] * 3)
    old.add(2.0, state.masks.logits, torch.zeros_like(first))
    assert old.thresholds is None
    kept = final_keep(state.masks, context.config.masks)
    assert state.records[-1].kept_channels == int(kept.sum()) / len(kept)


def test_the_record_of_an_epoch(tiny: Tiny, synthetic: Images, context_for: Contexts) -> None:
    source = synthetic("abcd")
    context = context_for(tiny({"masks.settle": 0.0}), source)
    model, state = second_step(context)
    stage_of(context, source, state, model).run()
    first, second = state.records
    assert (first.step, first.stage, first.epoch, first.epochs) == (2, "representation", 1, 2)
    assert (second.epoch, first.lr, second.lr) == (2, 0.05, pytest.approx(0.005))
    assert first.loss > 0
    assert 0 <= first.accuracy <= 100
    assert first.sparsity_weight == 1.0
    assert 0 < first.kept_share <= 1


def test_without_masks_there_is_nothing_to_log(tiny: Tiny, synthetic: Images, context_for: Contexts) -> None:
    source = synthetic("abcd")
    context = context_for(tiny({"masks.enabled": False}), source)
    model, state = second_step(context)
    stage_of(context, source, state, model).run()
    assert state.masks is None
    assert state.mask_log.times == []
    assert (state.records[0].kept_share, state.records[0].kept_channels, state.records[0].sparsity_weight) == (None, None, None)
    assert not any(record.settled for record in state.records)


@pytest.mark.parametrize("done", [1, 2, 3])
def test_an_interrupted_stage_goes_on_as_if_nothing_had_happened(done: int, tiny: Tiny, synthetic: Images, context_for: Contexts) -> None:
    changes = {"later.epochs": 4, "later.warmup_epochs": 2, "masks.settle": 0.25, "masks.target_params": 0.4, "masks.sparsity": 1e6}
    source = synthetic("abcd")
    written: list[tuple[dict[str, torch.Tensor], dict[str, Any]]] = []

    def note(state: DerState) -> None:
        written.append(({name: value.clone() for name, value in state.tensors().items()}, state.facts()))

    context = context_for(tiny(changes), source, save=note)
    model, straight = second_step(context)
    stage_of(context, source, straight, model).run()
    model, resumed = second_step(context)
    resumed.restore(*written[done - 1])
    stage_of(context, source, resumed, model).run()
    assert len(written) == 4 + (4 - done)
    one, other = written[3][0], written[-1][0]
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    timed = {"images_per_s": 0.0, "seconds": 0.0, "data_seconds": 0.0, "processor_seconds": None}
    assert [replace(row, **timed) for row in resumed.records] == [replace(row, **timed) for row in straight.records]


def test_known_classes_do_not_matter_to_an_empty_bank(tiny: Tiny, synthetic: Images, context_for: Contexts) -> None:
    source = synthetic("ab")
    context = context_for(tiny(), source)
    state = begin_step(context, Model(Network(build_architecture("resnet20", width=2))), 2)
    RepresentationStage(context, state, FrozenBank(), source, 0, context.config.first).run()
    assert len(state.records) == 2
