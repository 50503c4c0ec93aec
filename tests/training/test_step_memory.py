"""What a finished step leaves in memory: its arena, its share of the classifier, and nothing else."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch

from der_fast.config.schema import Config
from der_fast.data import MemorySource
from der_fast.training.classifier_stage import train_classifier
from der_fast.training.learner import Learner
from der_fast.training.methods.der import method as der
from der_fast.training.progress import EpochRecord
from der_fast.training.state import CLASSIFIER, REPRESENTATION, StepState


def bytes_of_tensors() -> int:
    """Bytes of everything that living tensors hold, each storage once."""
    gc.collect()
    storages = {}
    for value in gc.get_objects():
        # Not those of other kinds, which other tests may have left: some have no memory.
        if type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout is torch.strided:
            for tensor in (value, value.grad) if value.is_leaf and value.grad is not None else (value,):
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_leaves_its_arena_and_no_copy(precision: str, tiny: Callable[..., Config], synthetic: Callable[..., MemorySource]) -> None:
    learner = Learner(
        tiny({"model.width": 8, "memory.total": 0, "masks.target_params": 0.2, "masks.floor": 0.0, "runtime.precision": precision})
    )
    sizes, banks = [], []
    for names in ("ab", "cd", "ef", "gh"):
        learner.learn(synthetic(names))
        learner.predict(synthetic(names).images)
        sizes.append(bytes_of_tensors())
        banks.append(learner.model.network.bank.nbytes + sum(value.numel() * 4 for value in learner.model.network.head.parameters()))
    arena = learner.model.network.bank.extractors[-1].arena.nbytes
    dense = 4 * learner.model.network.architecture.parameters()
    assert arena < dense / 2, "too little was pruned: the test shows nothing"
    for step in (2, 3):
        grown = sizes[step] - sizes[step - 1]
        # The rest is logs of masks and the step's results.
        assert grown - (banks[step] - banks[step - 1]) < 0.25 * arena


@pytest.mark.parametrize("settle", [0.0, 0.5])
def test_no_gradient_outlives_the_representation_stage(
    settle: float, tiny: Callable[..., Config], synthetic: Callable[..., MemorySource], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def watched(context: object, state: StepState, *rest: object) -> None:
        seen.append(sum(parameter.grad is not None for parameter in state.extractor.parameters()))
        train_classifier(context, state, *rest)  # type: ignore[arg-type]
        seen.append(sum(parameter.grad is not None for parameter in state.extractor.parameters()))

    monkeypatch.setattr(der, "train_classifier", watched)
    learner = Learner(tiny({"masks.settle": settle}))
    for names in ("ab", "cd"):
        learner.learn(synthetic(names))
    assert seen == [0, 0]


def record(stage: str, seconds: float, settled: bool, processor: float | None = None) -> EpochRecord:
    rest = {"settled": settled, "seconds": seconds, "processor_seconds": processor}
    return EpochRecord(1, stage, 1, 4, 1.0, 50.0, 0.1, None, None, 100.0, **rest)


def test_time_saved_is_told_by_the_median_epoch() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    before, after = record(REPRESENTATION, 8.0, False, 16.0), record(REPRESENTATION, 2.0, True, 4.0)
    odd = record(REPRESENTATION, 800.0, False, 1600.0)
    # Two settled epochs: 8 s each at the speed before, 2 s at the speed after; one slow epoch does not move the median.
    assert der.saved_seconds([before, odd, before, after, after], gpu) == pytest.approx(12.0)
    # On a CPU, threads share the processor's time.
    assert der.saved_seconds([before, odd, before, after, after], cpu) == pytest.approx(24.0 / torch.get_num_threads())
    # The clock says that a busy machine lost time; the processor knows better.
    busy = record(REPRESENTATION, 83.0, True, 4.0)
    assert der.saved_seconds([before, busy], cpu) == pytest.approx(12.0 / torch.get_num_threads())


def test_time_saved_is_nothing_where_it_cannot_be_told() -> None:
    before, after = record(REPRESENTATION, 8.0, False, 8.0), record(REPRESENTATION, 2.0, True, 2.0)
    for records in ([after, after], [before, record(CLASSIFIER, 9.0, False, 9.0)], [before, record(REPRESENTATION, 9.0, True, 16.0)]):
        assert der.saved_seconds(records, torch.device("cpu")) is None
    assert der.saved_seconds([record(REPRESENTATION, 8.0, False), after], torch.device("cpu")) is None
    assert der.saved_seconds([before, record(REPRESENTATION, 83.0, True)], torch.device("cuda")) is None
