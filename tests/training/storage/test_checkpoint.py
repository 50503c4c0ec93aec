from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from der_fast.config.schema import Config
from der_fast.data import MemorySource
from der_fast.errors import StorageError
from der_fast.model.architecture import build_architecture
from der_fast.training.context import Context
from der_fast.training.cross_entropy import CrossEntropyStage
from der_fast.training.methods.der.method import begin_step
from der_fast.training.methods.der.state import DerState
from der_fast.training.model import Model, Network
from der_fast.training.state import CLASSIFIER, REPRESENTATION
from der_fast.training.storage import checkpoint
from der_fast.training.storage.checkpoint import Checkpoints, task_of
from der_fast.training.storage.named_files import save_record


@pytest.fixture
def state_of(
    tiny: Callable[..., Config], synthetic: Callable[..., MemorySource], context_for: Callable[..., Context]
) -> Callable[..., DerState]:
    """Makes a step's state whose every weight is `value`."""

    def make(step: int = 1, stage: str = REPRESENTATION, epoch: int = 0, value: float = 0.0) -> DerState:
        state = begin_step(context_for(tiny(), synthetic("ab")), Model(Network(build_architecture("resnet20", width=1))), 2)
        if stage != state.stage:
            state.enter(stage)
        state.step, state.epoch, state.elapsed = step, epoch, value
        with torch.no_grad():
            for module in state.modules().values():
                for parameter in module.parameters():
                    parameter.fill_(value)
        state.momentum = {"head.weight": torch.full_like(state.head.weight, value)}
        for row in range(epoch + 1):
            state.mask_log.add(row, torch.full((state.masks.layout.channels,), value))
        return state

    return make


def values_of(state: DerState) -> set[float]:
    """The numbers that a state is made of; one, if it was restored as a whole."""
    weights = [value for module in state.modules().values() for value in module.parameters()]
    return {float(number) for value in [*weights, *state.momentum.values(), *state.mask_log.logits] for number in value.detach().unique()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoints/*"))


def damage(path: Path, kind: str) -> None:
    data = bytearray(path.read_bytes())
    if kind == "cut off":
        data = data[: len(data) // 2]
    elif kind == "a flipped bit":
        data[len(data) // 2] ^= 1
    path.write_bytes(data)


def write(checkpoints: Checkpoints, state: DerState) -> None:
    checkpoints.save(state)
    checkpoints.flush()


def test_the_newest_comes_back_as_a_whole(tmp_path: Path, state_of: Callable[..., DerState]) -> None:
    checkpoints = Checkpoints(tmp_path, 2)
    for epoch in (1, 2, 3):
        checkpoints.save(state_of(epoch=epoch, value=float(epoch)))
    state, said = state_of(), []
    assert checkpoints.restore(state, said.append)
    assert said == []
    assert (state.stage, state.epoch, state.elapsed, len(state.mask_log.times)) == (REPRESENTATION, 3, 3.0, 4)
    assert values_of(state) == {3.0}


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_the_last_few_stay(keep: int, tmp_path: Path, state_of: Callable[..., DerState]) -> None:
    checkpoints = Checkpoints(tmp_path, keep)
    for epoch in range(1, 12):
        checkpoints.save(state_of(epoch=epoch))
    checkpoints.save(state_of(stage=CLASSIFIER, epoch=0))
    stems = [f"001-1-representation-{epoch:04d}" for epoch in range(1, 12)] + ["001-2-classifier-0000"]
    assert [stem.name for stem in checkpoints.stems()] == stems[-keep:]
    assert len(names(tmp_path)) == 2 * keep
    checkpoints.clear()
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", ["cut off", "a flipped bit"])
@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_a_damaged_one_is_passed_over_with_a_message(kind: str, suffix: str, tmp_path: Path, state_of: Callable[..., DerState]) -> None:
    checkpoints, said = Checkpoints(tmp_path, 2), []
    for epoch in (1, 2):
        checkpoints.save(state_of(epoch=epoch, value=float(epoch)))
    damage(checkpoints.stems()[-1].with_suffix(suffix), kind)
    state = state_of()
    assert checkpoints.restore(state, said.append)
    assert (state.epoch, values_of(state)) == (1, {1.0})
    assert len(said) == 1
    assert "001-1-representation-0002 is skipped, going back to the one before" in said[0]
    assert f"0002{suffix}" in said[0]


def test_where_none_is_whole_the_step_begins_anew(tmp_path: Path, state_of: Callable[..., DerState]) -> None:
    checkpoints, said = Checkpoints(tmp_path, 2), []
    for epoch in (1, 2):
        checkpoints.save(state_of(epoch=epoch))
    for stem in checkpoints.stems():
        damage(stem.with_suffix(".safetensors"), "cut off")
    assert not checkpoints.restore(state_of(), said.append)
    assert len(said) == 2


def test_without_any(tmp_path: Path, state_of: Callable[..., DerState]) -> None:
    assert not Checkpoints(tmp_path / "none", 2).restore(state_of(), pytest.fail)
    Checkpoints(tmp_path / "none", 2).clear()


def test_one_of_another_network_is_passed_over(
    tmp_path: Path, state_of: Callable[..., DerState], tiny: Callable[..., Config], synthetic: Callable[..., MemorySource],
    context_for: Callable[..., Context],
) -> None:  # fmt: skip
    write(Checkpoints(tmp_path, 2), state_of(epoch=1))
    wider = begin_step(context_for(tiny(), synthetic("ab")), Model(Network(build_architecture("resnet20", width=2))), 2)
    said: list[str] = []
    assert not Checkpoints(tmp_path, 2).restore(wider, said.append)
    assert len(said) == 1


def test_only_those_of_the_same_step_and_task_are_restored(tmp_path: Path, state_of: Callable[..., DerState]) -> None:
    write(Checkpoints(tmp_path, 2, "cats"), state_of(step=3, epoch=1))
    assert not Checkpoints(tmp_path, 2, "dogs").restore(state_of(step=3), pytest.fail)
    assert not Checkpoints(tmp_path, 2, "cats").restore(state_of(step=2), pytest.fail)
    assert Checkpoints(tmp_path, 2, "cats").restore(state_of(step=3), pytest.fail)


def test_a_step_that_is_learned_again_keeps_its_new_checkpoints(tmp_path: Path, state_of: Callable[..., DerState]) -> None:
    old = Checkpoints(tmp_path, 2, "first time")
    for state in (state_of(step=3, epoch=9), state_of(step=3, stage=CLASSIFIER, epoch=1)):
        write(old, state)
    new = Checkpoints(tmp_path, 2, "second time")
    new.save(state_of(step=3, epoch=1, value=1.0))
    assert [stem.name for stem in new.stems()] == ["003-1-representation-0001"]
    new.save(state_of(step=3, epoch=2, value=2.0))
    state = state_of(step=3)
    assert new.restore(state, pytest.fail)
    assert values_of(state) == {2.0}


def test_tensors_without_a_manifest_are_no_checkpoint(tmp_path: Path, state_of: Callable[..., DerState]) -> None:
    checkpoints = Checkpoints(tmp_path, 2)
    for epoch in (1, 2):
        checkpoints.save(state_of(epoch=epoch, value=float(epoch)))
    checkpoints.stems()[-1].with_suffix(".json").unlink()
    state = state_of()
    assert checkpoints.restore(state, pytest.fail)
    assert values_of(state) == {1.0}
    checkpoints.clear()
    assert names(tmp_path) == []


def test_a_classifier_that_was_sliced_comes_back(tmp_path: Path, state_of: Callable[..., DerState]) -> None:
    before = state_of(stage=CLASSIFIER, value=1.0)
    before.head, before.momentum = torch.nn.Linear(3, 2), {}
    write(Checkpoints(tmp_path, 2), before)
    state = state_of()
    assert Checkpoints(tmp_path, 2).restore(state, pytest.fail)
    assert torch.equal(state.head.weight, before.head.weight)


def test_a_task_is_named_by_everything_that_decides() -> None:
    facts = {"config": {"lr": 0.1}, "known": ("a", "b"), "train": "12"}
    assert task_of(facts) == task_of(dict(reversed(facts.items())))
    assert len({task_of({**facts, "config": {"lr": lr}}) for lr in (0.1, 0.2, 0.3)}) == 3


def test_what_is_saved_is_the_state_as_it_was(tmp_path: Path, state_of: Callable[..., DerState], monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints, go_on = Checkpoints(tmp_path, 2), threading.Event()

    def slowly(*arguments: Any) -> None:
        assert go_on.wait(60)
        save_record(*arguments)

    monkeypatch.setattr(checkpoint, "save_record", slowly)
    state = state_of(epoch=1, value=1.0)
    checkpoints.save(state)
    # Training goes on while the thread has not written anything yet.
    with torch.no_grad():
        for tensor in state.tensors().values():
            tensor.fill_(7)
    state.records.clear()
    state.epoch = 5
    go_on.set()
    restored = state_of()
    assert checkpoints.restore(restored, pytest.fail)
    assert (restored.epoch, values_of(restored)) == (1, {1.0})


def test_what_could_not_be_written_is_told_with_the_next(
    tmp_path: Path, state_of: Callable[..., DerState], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path, 2)
    write(checkpoints, state_of(epoch=1, value=1.0))

    def full(*arguments: Any) -> None:
        raise StorageError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_record", full)
        checkpoints.save(state_of(epoch=2))
        with pytest.raises(StorageError, match="no space left"):
            checkpoints.save(state_of(epoch=3))
        checkpoints.save(state_of(epoch=4))
        with pytest.raises(StorageError, match="no space left"):
            checkpoints.flush()
        checkpoints.flush()
    state = state_of()
    assert checkpoints.restore(state, pytest.fail)
    assert (state.epoch, values_of(state)) == (1, {1.0})
    write(checkpoints, state_of(epoch=5, value=5.0))
    assert [stem.name[-4:] for stem in checkpoints.stems()] == ["0001", "0005"]


# Of two batches an epoch the first is followed by a checkpoint within it.
@pytest.mark.parametrize(("seconds", "saves"), [(600.0, 1), (0.0, 5), (1e-9, 10)])
def test_how_often_a_stage_saves(
    seconds: float, saves: int, tiny: Callable[..., Config], synthetic: Callable[..., MemorySource], context_for: Callable[..., Context]
) -> None:
    config = tiny({"runtime.checkpoint_seconds": seconds, "first.epochs": 5, "first.batch_size": 6, "masks.settle": 0.0})
    written: list[int] = []
    source = synthetic("ab", 6)
    context = replace(context_for(config, source), save=lambda state: written.append(state.epoch))
    state = begin_step(context, Model(Network(build_architecture("resnet20", width=2, stem="small"))), 2)
    CrossEntropyStage(context, state, source, config.first).run()
    assert len(written) == saves
    assert written[-1] == 5
