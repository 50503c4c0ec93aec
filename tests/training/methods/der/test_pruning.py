from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from der_fast.compaction.plan import with_floor
from der_fast.config.schema import MasksConfig
from der_fast.kernels.channel_masks import sparsity_loss
from der_fast.model.architecture import BACKBONES, build_architecture
from der_fast.model.layout import MaskLayout
from der_fast.model.masks import ChannelMasks
from der_fast.training.methods.der.pruning import final_keep, kept_share, meet_budget, thresholds
from der_fast.training.methods.der.sparsity import Budget, SparsityController, budget_threshold, interval

LAYOUT = MaskLayout(build_architecture("resnet20", width=2))
seeds = st.integers(0, 10**6)
shares = st.floats(0.02, 1.0)
floors = st.sampled_from([0.0, 0.25, 0.5, 1.0])
powers = st.sampled_from([0.0, 1.0, 2.0])


def config_of(target: float | None, floor: float = 0.0, power: float = 0.0) -> MasksConfig:
    return replace(MasksConfig(), target_params=target, floor=floor, price_power=power, clamp=6.0, sparsity=2.0, lr=0.5)


def masks_of(seed: int, low: float = -2.0, high: float = 3.0) -> ChannelMasks:
    return ChannelMasks(LAYOUT, low=low, high=high, clamp=6.0, generator=torch.Generator().manual_seed(seed))


def controller_of(config: MasksConfig, batches: int, every: int = 1) -> SparsityController:
    return SparsityController(config, batches, LAYOUT, torch.device("cpu"), every=every)


def update(controller: SparsityController, masks: ChannelMasks, batch: int) -> None:
    controller.follow(batch, masks.logits.detach())


def only_the_floor(logits: Tensor, floor: float) -> Tensor:
    return with_floor(LAYOUT, logits, torch.zeros(LAYOUT.channels, dtype=torch.bool), floor)


def test_kept_share_counts_parameters() -> None:
    everything = torch.ones(LAYOUT.channels, dtype=torch.bool)
    assert kept_share(LAYOUT, everything) == 1.0
    assert kept_share(LAYOUT, ~everything) == 0.0
    keep = everything.clone()
    keep[LAYOUT.slice_of(("stage3.2",))] = False
    # The block's two 3×3 convolutions between 8 channels, and the first one's batch-norm, are gone.
    assert kept_share(LAYOUT, keep) == pytest.approx(1 - (2 * 9 * 8 * 8 + 2 * 8) / LAYOUT.architecture.parameters())


@settings(max_examples=25)
@given(seed=seeds, target=shares, floor=floors, power=powers)
def test_budget_threshold_is_the_smallest_that_meets_the_budget(seed: int, target: float, floor: float, power: float) -> None:
    logits, config = masks_of(seed).logits.detach(), config_of(target, floor, power)
    scores = logits / LAYOUT.prices().pow(power)

    def share(tau: float) -> float:
        return kept_share(LAYOUT, with_floor(LAYOUT, logits, scores > tau, floor))

    # By trying all of them in order instead of a bisection.
    candidates = [float(scores.min()) - 1, *scores.sort().values.tolist()]
    meeting = [tau for tau in candidates if share(tau) <= target]
    assert budget_threshold(LAYOUT, logits, config) == (meeting[0] if meeting else candidates[-1])


@given(seed=seeds, low=shares, high=shares, power=powers)
def test_a_smaller_budget_keeps_a_subset(seed: int, low: float, high: float, power: float) -> None:
    kept = []
    for target in sorted((low, high)):
        masks, config = masks_of(seed), config_of(target, power=power)
        meet_budget(masks, config)
        kept.append(final_keep(masks, config))
    assert not (kept[0] & ~kept[1]).any()


@given(seed=seeds, low=st.sampled_from([-6.0, -2.0, 0.0]), target=shares, floor=floors, power=powers)
def test_the_budget_is_met_and_the_floor_is_kept(seed: int, low: float, target: float, floor: float, power: float) -> None:
    masks, config = masks_of(seed, low, 3.0), config_of(target, floor, power)
    before = masks.logits.detach().clone()
    kept_before = final_keep(masks, config)
    meet_budget(masks, config)
    keep = final_keep(masks, config)
    least = only_the_floor(before, floor)
    assert kept_share(LAYOUT, keep) <= target or torch.equal(keep, least)
    assert not (least & ~keep).any()
    assert not (keep & ~kept_before).any()
    if kept_share(LAYOUT, kept_before) <= target:
        assert torch.equal(masks.logits, before)
    assert (masks.logits <= before).all()
    if power == 0:
        assert (masks.logits.detach()[before.argsort()].diff() >= 0).all()


@given(seed=seeds, target=shares, power=powers)
def test_what_exceeds_its_groups_threshold_stays(seed: int, target: float, power: float) -> None:
    masks, config = masks_of(seed), config_of(target, power=power)
    before, needed = masks.logits.detach().double(), thresholds(masks, config)
    assert needed.shape == (len(LAYOUT.names),) and (needed >= 0).all()
    meet_budget(masks, config)
    spread = needed.repeat_interleave(torch.tensor([LAYOUT.architecture.groups[name] for name in LAYOUT.names]))
    # One channel stands exactly at the threshold, up to rounding, and goes.
    assert (before[masks.keep()] > spread[masks.keep()] - 1e-6).all()
    assert (before[~masks.keep()] < spread[~masks.keep()] + 1e-6).all()
    assert torch.equal(thresholds(masks_of(seed), config_of(None)), torch.zeros_like(needed))


@given(seed=seeds, floor=floors)
def test_every_stream_keeps_its_floor(seed: int, floor: float) -> None:
    masks = masks_of(seed, -6.0, 0.5)
    keep = LAYOUT.by_group(final_keep(masks, config_of(None, floor)))
    for name in LAYOUT.stream_groups():
        assert int(keep[name].sum()) >= math.ceil(floor * keep[name].numel())


def test_without_a_target_nothing_is_shifted_and_the_weight_is_constant() -> None:
    masks, config = masks_of(0), config_of(None)
    before = masks.logits.detach().clone()
    meet_budget(masks, config)
    assert torch.equal(masks.logits, before)
    controller = controller_of(config, 50)
    for batch in range(50):
        update(controller, masks, batch)
        assert controller.weight == config.sparsity


@pytest.mark.parametrize("target", [0.05, 0.3, 0.9])
def test_the_controllers_weight_is_a_finite_number_of_at_least_0(target: float) -> None:
    masks = masks_of(1, 0.0, 2.0)
    controller = controller_of(config_of(target), 30)
    for batch in range(30):
        update(controller, masks, batch)
        assert 0 <= controller.weight < math.inf
        (gradient,) = torch.autograd.grad(controller.weight * masks.with_sparsity(1.0)[1], masks.logits)
        with torch.no_grad():
            masks.logits -= 0.5 * gradient


@pytest.mark.parametrize("rate", [0.0, 1e-320])
def test_logits_that_stand_still_do_not_stop_the_controller(rate: float) -> None:
    config = replace(config_of(0.3), lr=rate)
    controller = controller_of(config, 30)
    update(controller, masks_of(1, 0.0, 2.0), 0)
    assert controller.weight == config.sparsity


def test_within_the_budget_the_controller_lets_go() -> None:
    masks = masks_of(2, -2.0, -1.0)
    controller = controller_of(config_of(0.5), 10)
    update(controller, masks, 0)
    assert controller.weight == 0.0


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_threshold_is_found_for_every_backbone(backbone: str) -> None:
    layout = MaskLayout(build_architecture(backbone, width=2))
    for seed, (target, floor, power) in enumerate([(0.24, 0.0, 1.5), (0.5, 0.3, 0.0), (0.01, 0.0, 1.0), (0.02, 1.0, 1.0), (1.0, 0.0, 1.0)]):
        config = config_of(target, floor, power)
        logits = torch.rand(layout.channels, generator=torch.Generator().manual_seed(seed)) * 4 - 1
        # Ties: several scores of a group, and of all groups, are the same.
        logits[::3] = logits[0]
        scores = logits / layout.prices().pow(power)
        tau = budget_threshold(layout, logits, config)

        def share(threshold: float, logits: Tensor = logits, scores: Tensor = scores, floor: float = floor) -> float:
            return kept_share(layout, with_floor(layout, logits, scores > threshold, floor))

        candidates = [float(scores.min()) - 1, *scores.sort().values.tolist()]
        below = [value for value in candidates if value < tau]
        assert tau in candidates
        assert share(tau) <= target or tau == candidates[-1]
        assert not below or share(below[-1]) > target


@given(seed=seeds)
def test_the_pull_is_the_gradient_of_the_sparsity_loss(seed: int) -> None:
    masks = masks_of(seed)
    soft = torch.sigmoid(masks.logits.detach().double()).requires_grad_()
    (gradient,) = torch.autograd.grad(sparsity_loss(soft, **LAYOUT.sparsity_terms(torch.float64)), soft)
    expected = (gradient * soft.detach() * (1 - soft.detach())).mean()
    found = Budget(LAYOUT, config_of(0.3), torch.device("cpu")).pull(masks.logits.detach())
    # The logits are float32, and their sigmoid is rounded to it.
    assert float(found) == pytest.approx(float(expected), rel=1e-6)


def test_the_controllers_weight_is_what_its_formula_says() -> None:
    masks, config = masks_of(3, 0.0, 2.0), config_of(0.3, power=1.0)
    controller = controller_of(config, 40)
    update(controller, masks, 10)
    budget = Budget(LAYOUT, config, torch.device("cpu"))
    wanted = float(budget.threshold(masks.logits.detach())) / (30 * config.lr * float(budget.pull(masks.logits.detach())))
    assert controller.weight == pytest.approx(min(wanted, config.sparsity))
    assert controller.weight == config.sparsity
    later = controller_of(replace(config, sparsity=1e9), 40)
    update(later, masks, 10)
    assert later.weight == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("batches", "epochs", "every"),
    [(1, 2, 1), (12, 1, 1), (16, 1, 1), (40, 17, 8), (55, 17, 8), (17, 10, 4), (100, 1, 2), (1000, 1, 8), (3, 100, 1), (0, 0, 1)],
)
def test_short_schedules_choose_the_weight_before_every_batch(batches: int, epochs: int, every: int) -> None:
    assert interval(batches, epochs) == every


def test_between_its_choices_the_weight_stays() -> None:
    masks, config = masks_of(3, 0.0, 2.0), replace(config_of(0.3), sparsity=1e9)
    controller, always = controller_of(config, 40, every=4), controller_of(config, 40)
    for batch in range(12):
        before = controller.weight
        update(controller, masks, batch)
        update(always, masks, batch)
        assert controller.weight == (before if batch % 4 else always.weight)
        assert float(controller.value) == float(torch.tensor(controller.weight, dtype=torch.float32))
        with torch.no_grad():
            masks.logits -= 0.01
    # What a run saves and continues with.
    later = controller_of(config, 40, every=4)
    later.weight = controller.weight
    assert torch.equal(later.value, controller.value)
    assert later.weight == controller.weight


@pytest.mark.parametrize(("batches", "epochs"), [(20, 4), (80, 4)])
@pytest.mark.parametrize("target", [0.4, 0.6, 0.8])
def test_the_ranking_reaches_zero_in_time_when_the_weight_is_chosen_now_and_then(batches: int, epochs: int, target: float) -> None:
    config, every, total = replace(config_of(target, power=1.5), sparsity=1e9, lr=1.0), interval(batches, epochs), batches * epochs
    assert every > 1
    masks, found = masks_of(1, 0.0, 2.0), []
    controller = controller_of(config, total, every)
    for batch in range(total):
        update(controller, masks, batch)
        (gradient,) = torch.autograd.grad(controller.value * masks.with_sparsity(1.0)[1], masks.logits)
        with torch.no_grad():
            masks.logits -= gradient
        found.append(budget_threshold(LAYOUT, masks.logits.detach(), config))
    # It starts far above 0 and must neither stay there nor be pushed far below, where more than the budget asks for is lost.
    assert found[0] > 0.3
    assert abs(found[-1]) < 0.02
