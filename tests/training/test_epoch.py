from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from der_fast.compaction.bank import FrozenBank
from der_fast.config.schema import Config
from der_fast.data import Batch, MemorySource
from der_fast.data.read.place import BEGINNING
from der_fast.errors import DivergenceError
from der_fast.model.architecture import build_architecture
from der_fast.training.context import Context
from der_fast.training.epoch import EpochMeter, count_batches, tally
from der_fast.training.methods.der.method import begin_step
from der_fast.training.methods.der.representation import RepresentationStage
from der_fast.training.model import Model, Network
from der_fast.training.position import Position
from der_fast.training.results import times_of
from der_fast.training.stage import Stage

Images = Callable[..., MemorySource]
Meter = Callable[[], tuple[Stage, EpochMeter]]


@pytest.fixture
def counting(tiny: Callable[..., Config], synthetic: Callable[..., MemorySource], context_for: Callable[..., Context]) -> Meter:
    """Makes a stage of three epochs, two batches each, with the meter of its first."""

    def make() -> tuple[Stage, EpochMeter]:
        source = synthetic("ab")
        context = context_for(tiny({"first.epochs": 3}), source)
        state = begin_step(context, Model(Network(build_architecture("resnet20", width=1))), 2)
        stage = RepresentationStage(context, state, FrozenBank(), source, 0, context.config.first)
        return stage, stage.meter()

    return make


def add(stage: Stage, meter: EpochMeter, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
    tally(meter.totals, loss, logits, labels)
    stage.count(meter, len(labels))


def test_loss_and_accuracy_are_means_over_images(counting: Meter) -> None:
    stage, meter = counting()
    add(stage, meter, torch.tensor(2.0), torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 0, 1]))
    add(stage, meter, torch.tensor(6.0), torch.tensor([[0.0, 1.0]]), torch.tensor([1]))
    stage.figures = lambda: {"kept_share": 0.5, "sparsity_weight": 2.0, "settled": True}  # type: ignore[method-assign]
    stage.finish(meter, 0.1)
    record = stage.state.records[0]
    assert (record.loss, record.accuracy) == (pytest.approx(3.0), pytest.approx(75.0))
    assert (record.epoch, record.epochs, record.lr, record.kept_share, record.sparsity_weight) == (1, 3, 0.1, 0.5, 2.0)
    assert record.settled
    assert stage.state.epoch == 1
    assert record.images_per_s > 0


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_no_number(loss: float, counting: Meter) -> None:
    stage, meter = counting()
    add(stage, meter, torch.tensor(loss), torch.zeros(1, 2), torch.tensor([0]))
    with pytest.raises(
        DivergenceError, match=r"step 1, representation stage, epoch 1\. Lower the learning rate \(now 0\.1\) with first\.lr"
    ) as caught:
        stage.finish(meter, 0.1)
    assert "masks.lr" in str(caught.value)
    # A checkpoint is no way out: --resume takes no other learning rate.
    assert "checkpoint" not in str(caught.value)
    assert stage.state.records == []


def test_the_classifier_stage_has_a_learning_rate_of_its_own(counting: Meter) -> None:
    stage, meter = counting()
    stage.state.enter("classifier")
    add(stage, meter, torch.tensor(math.nan), torch.zeros(1, 2), torch.tensor([0]))
    with pytest.raises(DivergenceError, match=r'Lower the learning rate \(now 0\.1\) with settings={"classifier.lr": …}\.$'):
        stage.finish(meter, 0.1)


@pytest.mark.parametrize("part", ["extractor.stem.weight", "extractor.norm.running_var", "head.bias", "masks.logits"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_was_ruined_by_the_last_batch(value: float, part: str, counting: Meter) -> None:
    stage, meter = counting()
    add(stage, meter, torch.tensor(1.0), torch.zeros(1, 2), torch.tensor([0]))
    module, name = part.split(".", 1)
    tensor = stage.state.modules()[module].state_dict()[name]
    tensor[(-1,) * tensor.dim()] = value
    with pytest.raises(DivergenceError, match="a weight became infinite or NaN"):
        stage.finish(meter, 0.1)


@pytest.mark.parametrize(
    ("images", "batch_size", "batches"), [(8, 4, 2), (9, 4, 2), (10, 4, 3), (1, 4, 1), (2, 4, 1), (4, 4, 1), (5, 4, 1), (0, 4, 0)]
)
def test_batches_of_an_epoch(
    images: int, batch_size: int, batches: int, synthetic: Images, tiny: Callable[..., Config], context_for: Callable[..., Context]
) -> None:
    assert count_batches(images, batch_size) == batches
    source = synthetic("a", max(images, 1)).subset(torch.arange(images))
    transform = context_for(tiny(), source).train_transform
    real = list(source.batches(None, batch_size, transform=transform, generator=torch.Generator(), shuffle=True))
    assert len(real) == batches


def test_waiting_for_images_is_counted_apart(counting: Meter, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on by 2 s while images come and by 7 s while they are learned; 3 s, 1 s of them waiting, lie behind."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("time.perf_counter", lambda: clock.now)
    monkeypatch.setattr("time.process_time", lambda: 0.0)

    def batches() -> Iterator[Batch]:
        for _ in range(3):
            clock.now += 2.0
            yield Batch(torch.zeros(1, 3, 1, 1), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
        clock.now += 0.5

    stage, _ = counting()
    stage.state.position = Position(BEGINNING, 1, 4, torch.zeros(2, dtype=torch.float64), 3.0, 1.0)
    meter = stage.meter()
    for batch in meter.timed(batches()):
        clock.now += 7.0
        meter.advance(len(batch.labels))
    stage.finish(meter, 0.1)
    record = stage.state.records[0]
    assert (record.seconds, record.data_seconds) == (3.0 + 3 * 9.0 + 0.5, 1.0 + 3 * 2.0 + 0.5)
    assert times_of([record, record]) == (61.0, 15.0)
    assert times_of([record, replace(record, seconds=None, data_seconds=None)]) == (None, None)


def test_figures_of_a_long_epoch_are_told_every_ten_seconds(counting: Meter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of 4 s: after the third and the sixth, not with the last one, which the whole epoch's figures follow."""
    clock, told = SimpleNamespace(now=100.0), list[tuple[float, float, float]]()
    monkeypatch.setattr("time.perf_counter", lambda: clock.now)
    monkeypatch.setattr("time.process_time", lambda: 0.0)
    stage, meter = counting()
    stage.batches = 9
    monkeypatch.setattr(stage.context.observer, "epoch_so_far", lambda *figures: told.append(figures))
    for number in range(9):
        clock.now += 4.0
        # Right in the first three batches, wrong afterwards.
        add(
            stage,
            meter,
            torch.tensor(float(number)),
            torch.tensor([[1.0, 0.0], [1.0, 0.0]]),
            torch.tensor([0, 0] if number < 3 else [1, 1]),
        )
    assert told == [(1.0, 100.0, 0.5), (2.5, 50.0, 0.5)]
    stage.finish(meter, 0.1)
    assert stage.state.records[0].loss == 4.0
