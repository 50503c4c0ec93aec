"""What a finished step leaves in memory: its arena, its share of the classifier, and nothing else."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch

from der_fast.config.schema import Config
from der_fast.data import MemorySource
from der_fast.training import step as step_module
from der_fast.training.learner import Learner
from der_fast.training.progress import EpochRecord
from der_fast.training.state import CLASSIFIER, REPRESENTATION, StepState
from der_fast.training.step import train_classifier


def bytes_of_tensors() -> int:
    """Bytes of everything that living tensors hold, each storage once."""
    gc.collect()
    storages = {}
    for value in gc.get_objects():
        # Not those of other kinds, which other tests may have left: some have no memory.
        if type(value) in (torch.Tensor, torch.nn.Parameter):
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
        banks.append(learner.model.bank.nbytes + sum(value.numel() * 4 for value in learner.model.head.parameters()))
    arena = learner.model.bank.extractors[-1].arena.nbytes
    dense = 4 * learner.model.architecture.parameters()
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

    monkeypatch.setattr(step_module, "train_classifier", watched)
    learner = Learner(tiny({"masks.settle": settle}))
    for names in ("ab", "cd"):
        learner.learn(synthetic(names))
    assert seen == [0, 0]


def record(stage: str, speed: float, settled: bool) -> EpochRecord:
    return EpochRecord(1, stage, 1, 4, 1.0, 50.0, 0.1, None, None, speed, settled)


def test_time_saved_is_counted_from_the_speeds() -> None:
    before, after = record(REPRESENTATION, 100.0, False), record(REPRESENTATION, 400.0, True)
    odd = record(REPRESENTATION, 1.0, False)
    # Two settled epochs of 800 images: 8 s each at the speed before, 2 s at the speed after; one slow epoch does not move the median.
    assert step_module._saved_seconds([before, odd, before, after, after], 800) == pytest.approx(12.0)
    assert step_module._saved_seconds([after, after], 800) is None
    assert step_module._saved_seconds([before, record(CLASSIFIER, 9.0, False)], 800) is None
    slower = record(REPRESENTATION, 50.0, True)
    assert step_module._saved_seconds([before, slower], 800) == pytest.approx(-8.0)
