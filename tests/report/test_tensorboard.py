"""TensorBoard event files, read back."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from der_fast.config.schema import Config, ScheduleConfig
from der_fast.errors import BackendError
from der_fast.report.tensorboard import TensorBoardObserver
from der_fast.training.progress import EpochRecord

CONFIG = Config(first=ScheduleConfig(epochs=3), later=ScheduleConfig(epochs=2))
RECORD = EpochRecord(
    step=1,
    stage="representation",
    epoch=1,
    epochs=3,
    loss=2.0,
    accuracy=50.0,
    lr=0.1,
    kept_share=None,
    sparsity_weight=None,
    images_per_s=900.0,
)


@pytest.fixture
def read_scalars():
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="needs the extra 'tensorboard'")

    def read(folder):
        events = accumulator.EventAccumulator(str(folder))
        events.Reload()
        return {tag: [(event.step, round(event.value, 5)) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}

    return read


def test_epochs_count_over_the_whole_run(tmp_path, read_scalars):
    observer = TensorBoardObserver(tmp_path)
    observer.run_begins(3, CONFIG)
    observer.step_begins(1, 3, ["cat", "dog"], 100)
    observer.epoch_ends(replace(RECORD, epoch=3))
    observer.epoch_ends(replace(RECORD, step=2, epoch=1, epochs=2, loss=1.5, kept_share=0.5, sparsity_weight=1.0))
    observer.epoch_ends(replace(RECORD, step=2, stage="classifier", epoch=1, epochs=4, loss=1.25))
    observer.epoch_ends(replace(RECORD, step=3, epoch=2, epochs=2, loss=1.0))
    observer.epoch_ends(replace(RECORD, step=3, stage="classifier", epoch=4, epochs=4, loss=0.5))
    observer.message("one line")
    observer.close()
    scalars = read_scalars(tmp_path)
    assert scalars["representation/loss"] == [(3, 2.0), (4, 1.5), (7, 1.0)]
    assert scalars["classifier/loss"] == [(1, 1.25), (8, 0.5)]
    assert scalars["representation/kept_share"] == [(4, 0.5)]
    assert scalars["step/images"] == [(1, 100.0)]


def test_steps_write_their_numbers_and_skip_what_is_absent(tmp_path, read_scalars):
    observer = TensorBoardObserver(tmp_path)
    observer.step_ends({"step": 2, "top1": 81.5, "top5": None, "params": 1000, "latency_ms": 2.5})
    scalars = read_scalars(tmp_path)
    assert scalars == {"step/top1": [(2, 81.5)], "step/params": [(2, 1000.0)], "step/latency_ms": [(2, 2.5)]}


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(BackendError, match=r"pip install 'der_fast\[tensorboard\]'"):
        TensorBoardObserver(tmp_path)
