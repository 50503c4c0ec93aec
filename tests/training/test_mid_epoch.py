"""Checkpoints in the middle of an epoch: from each of them a run goes on to the same numbers and weights, bit for bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from der_fast.config.schema import Config
from der_fast.data import MemorySource
from der_fast.data.read.place import Place
from der_fast.errors import DivergenceError
from der_fast.model.architecture import build_architecture
from der_fast.training import epoch as epochs
from der_fast.training.context import Context
from der_fast.training.epoch import EpochMeter, tally
from der_fast.training.learner import Learner
from der_fast.training.methods.der import representation
from der_fast.training.methods.der.method import begin_step
from der_fast.training.model import Model, Network
from der_fast.training.position import Position
from der_fast.training.progress import Observer
from der_fast.training.run import run_protocol
from der_fast.training.stage import Stage
from der_fast.training.state import StepState
from der_fast.training.storage.checkpoint import Checkpoints

Tiny = Callable[..., Config]
Images = Callable[..., MemorySource]
Facts = Callable[[Path], dict[str, Any]]

# A warm-up at whose end classifiers start again, an epoch that learns masks, one with binary masks; λ_s follows the budget.
KEYS: dict[str, Any] = {
    "protocol.name": "B0-2", "masks.settle": 0.34, "masks.target_params": 0.5,
    **{f"{stage}.{name}": value for stage in ("first", "later")
       for name, value in {"epochs": 3, "warmup_epochs": 1, "batch_size": 4}.items()},
    "classifier.batch_size": 6, "runtime.checkpoint_seconds": 1e-9,
}  # fmt: skip
BATCHES = [*[(1, "representation", epoch, 3) for epoch in (1, 2, 3)], *[(2, "representation", epoch, 5) for epoch in (1, 2, 3)],
           *[(2, "classifier", epoch, 4) for epoch in (1, 2)]]  # fmt: skip
EVENTS = [(*place, batch) for *place, batches in BATCHES for batch in range(1, batches + 1)]


class StopHere(Exception):
    pass


class Batches(Observer):
    """Notes the batches that it is told of, and stops the run in one of them."""

    def __init__(self, stop: int | None = None) -> None:
        self.seen: list[tuple[Any, ...]] = []
        self.stop = stop
        self.messages: list[str] = []

    def batch_ends(self, step: int, stage: str, epoch: int, epochs: int, batch: int, batches: int, images: int) -> None:
        self.seen.append((step, stage, epoch, batch))
        if self.stop is not None and len(self.seen) > self.stop:
            raise StopHere

    def message(self, text: str) -> None:
        self.messages.append(text)


def run(out: Path, tiny: Tiny, synthetic: Images, changes: dict[str, Any] | None = None, **rest: Any) -> Learner:
    config = tiny({**KEYS, **(changes or {})})
    side = 37 if config.data.random_resized_crop else 8
    return run_protocol(config, synthetic("abcd", side=side), synthetic("abcd", 2, side, 1), out, **rest)


def cut(out: Path, number: int, tiny: Tiny, synthetic: Images, changes: dict[str, Any] | None = None) -> Path:
    """A run that was stopped when batch `number` (of `EVENTS`) had been trained and not been written down."""
    with pytest.raises(StopHere):
        run(out, tiny, synthetic, changes, observer=Batches(number))
    return out


PHOTOS = {"data.random_resized_crop": True, "data.image_size": 32, "data.reader": "memory"}


@pytest.fixture(scope="module")
def kind(request: pytest.FixtureRequest) -> dict[str, Any]:
    return PHOTOS if request.param == "photos in memory" else {}


@pytest.fixture(scope="module")
def straight(
    kind: dict[str, Any], tiny: Tiny, synthetic: Images, run_facts: Facts, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What a run leaves that nothing interrupted and that wrote down nothing within its epochs."""
    out, observer = tmp_path_factory.mktemp("straight") / "run", Batches()
    run(out, tiny, synthetic, {**kind, "runtime.checkpoint_seconds": 0}, observer=observer)
    assert observer.seen == EVENTS
    return run_facts(out)


@pytest.mark.parametrize(
    ("kind", "number"),
    [*(("small images", number) for number in (1, 4, 8, 11, 15, 22, 25, 31)), *(("photos in memory", number) for number in (2, 16, 30))],
    indirect=["kind"],
)
def test_a_run_goes_on_with_the_batch_that_was_not_written_down(
    number: int, kind: dict[str, Any], straight: dict[str, Any], tmp_path: Path, tiny: Tiny, synthetic: Images, run_facts: Facts
) -> None:
    out = cut(tmp_path / "run", number, tiny, synthetic, kind)
    observer = Batches()
    run(out, tiny, synthetic, {**kind, "runtime.checkpoint_seconds": 0}, resume=True, observer=observer)
    assert observer.seen == EVENTS[number:]
    assert run_facts(out) == straight
    assert not list(out.glob("checkpoints/*"))


def test_interrupted_again_and_again(tmp_path: Path, tiny: Tiny, synthetic: Images, run_facts: Facts) -> None:
    out = tmp_path / "run"
    for begun in range(0, len(EVENTS) - 5, 5):
        with pytest.raises(StopHere):
            run(out, tiny, synthetic, resume=begun > 0, observer=(observer := Batches(5)))
        assert observer.seen == EVENTS[begun : begun + 6]
    run(out, tiny, synthetic, resume=True)
    run(tmp_path / "straight", tiny, synthetic)
    assert run_facts(out) == run_facts(tmp_path / "straight")


def test_the_weight_of_sparsity_that_was_chosen_batches_ago_is_kept(
    tmp_path: Path, tiny: Tiny, synthetic: Images, run_facts: Facts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(representation, "interval", lambda batches, epochs: 4)
    # A budget that is far away, and no bound that λ_s would soon meet.
    keys, once = {"masks.target_params": 0.05, "masks.sparsity": 1e3}, {"runtime.checkpoint_seconds": 0}
    run(tmp_path / "straight", tiny, synthetic, {**keys, **once})
    # Batch 3 of the step: the next choice is due before batch 5.
    out = cut(tmp_path / "run", EVENTS.index((2, "representation", 1, 3)), tiny, synthetic, keys)
    run(out, tiny, synthetic, {**keys, **once}, resume=True)
    assert run_facts(out) == run_facts(tmp_path / "straight")


def test_a_damaged_one_costs_no_more_than_the_batches_since_the_one_before(tmp_path: Path, tiny: Tiny, synthetic: Images) -> None:
    number = EVENTS.index((2, "representation", 2, 5))
    out = cut(tmp_path / "run", number, tiny, synthetic)
    names = [stem.name for stem in Checkpoints(out, 2).stems()]
    assert names == ["002-1-representation-0001-00000003", "002-1-representation-0001-00000004"]
    for damaged, begun in ((names[-1:], number - 1), (names, EVENTS.index((2, "representation", 1, 1)))):
        copy = shutil.copytree(out, tmp_path / str(begun))
        for name in damaged:
            path = copy / "checkpoints" / f"{name}.safetensors"
            path.write_bytes(path.read_bytes()[:-10])
        run(copy, tiny, synthetic, resume=True, observer=(observer := Batches()))
        assert observer.seen == EVENTS[begun:]
        assert sum("is skipped, going back to the one before" in text for text in observer.messages) == len(damaged)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """What the meter takes for the time."""
    now = [100.0]
    monkeypatch.setattr(epochs.time, "perf_counter", lambda: now[0])
    yield now


Counting = tuple[Stage, EpochMeter]
Written = list[tuple[dict[str, torch.Tensor], dict[str, Any]]]


@pytest.fixture
def meter_of(tiny: Tiny, synthetic: Images, context_for: Callable[..., Context]) -> Callable[..., tuple[Counting, Written]]:
    """Makes a stage of ten batches, with its meter, that writes down every 60 seconds, and the list of what was written down."""

    def make(state: StepState | None = None) -> tuple[Counting, Written]:
        written: Written = []
        context = context_for(tiny({"runtime.checkpoint_seconds": 60.0}), synthetic("ab"))
        context = replace(context, save=lambda state: written.append((state.tensors(), state.facts())))
        state = state or begin_step(context, Model(Network(build_architecture("resnet20", width=1))), 2)
        stage = Stage(context, state, synthetic("ab"), context.config.first, lambda images, labels: (images, labels))
        stage.batches = 10
        # Called when the state is brought up to date.
        stage.write_down = lambda: stage.state.notes.append("up to date")  # type: ignore[method-assign]
        return (stage, stage.meter()), written

    return make


def one_batch(counting: Counting, place: Place | None, loss: float = 1.0) -> None:
    stage, meter = counting
    tally(meter.totals, torch.tensor(loss), torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1]))
    stage.count(meter, 2)
    stage.checkpoint(meter, place, 0.1)


def test_it_is_written_down_when_the_last_checkpoint_is_old_enough(
    meter_of: Callable[..., tuple[Counting, Written]], clock: list[float]
) -> None:
    meter, written = meter_of()
    counts = []
    for batch in range(1, 11):
        clock[0] += 25
        one_batch(meter, Place(batch + 1, 1))
        counts.append(len(written))
        assert meter[0].state.position is None
    # After 75, 150 and 225 s; after the last batch the epoch's own checkpoint follows.
    assert counts == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3]
    assert written[1][1]["position"] == {"place": [7, 1], "batches": 6, "images": 12, "seconds": 150.0, "waited": 0.0}
    assert written[1][0]["position.totals"].tolist() == [12.0, 6.0] and written[1][1]["notes"] == ["up to date"] * 2


def test_a_source_that_cannot_say_where_it_stands_is_not_written_down(
    meter_of: Callable[..., tuple[Counting, Written]], clock: list[float]
) -> None:
    meter, written = meter_of()
    clock[0] += 1000
    one_batch(meter, None)
    assert written == []


def test_an_epoch_counts_what_was_trained_before_it_was_interrupted(
    meter_of: Callable[..., tuple[Counting, Written]], clock: list[float]
) -> None:
    meter, _ = meter_of()
    state = meter[0].state
    state.elapsed, state.position = 7.0, Position(Place(5, 2), 4, 8, torch.tensor([20.0, 8.0], dtype=torch.float64), 30.0)
    assert state.spent == 37.0
    meter, _ = meter_of(state)
    assert (meter[1].start, meter[1].batch, state.position) == (Place(5, 2), 4, None)
    clock[0] += 10
    one_batch(meter, Place(6, 2))
    meter[0].finish(meter[1], 0.1)
    record = state.records[0]
    assert (record.loss, record.accuracy, record.images_per_s, state.elapsed) == (2.2, 90.0, 0.25, 47.0)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_not_written_down(
    loss: float, meter_of: Callable[..., tuple[Counting, Written]], clock: list[float]
) -> None:
    meter, written = meter_of()
    clock[0] += 60
    with pytest.raises(DivergenceError, match=r"in step 1, representation stage, epoch 1\. Lower"):
        one_batch(meter, Place(1), loss)
    assert written == []
