"""The schedule of CIFAR-100 B0-10: measured in small, extrapolated by arithmetic that is checked here."""

from __future__ import annotations

import pytest

from bench.studies import agreement, schedule
from der_fast.training.progress import EpochRecord


def epoch(step, stage, settled=False):
    return EpochRecord(step, stage, 1, 1, 1.0, 50.0, 0.1, None, None, 100.0, settled)


def test_epochs_are_counted_as_often_as_the_paper_has_them():
    times = [(epoch(1, "representation"), 5.0), *[(epoch(1, "representation"), 2.0)] * 2, (epoch(1, "representation", True), 1.0)]
    times += [(epoch(1, "classifier"), 0.5)]
    # 10.5 s of epochs within 12 s: 1.5 s of everything else, and 3 s that the first epoch took longer. 17 epochs before settling.
    assert schedule.extrapolated([12.0], times) == pytest.approx(1.5 + 3.0 + 17 * 2.0 + 153 * 1.0 + 30 * 0.5)


def test_the_projection_draws_lines_between_measured_steps(record_of):
    records = [record_of("epoch.train", "ours", ms, {"t": t, "batch": 128}) for t, ms in ((1, 2.0), (10, 3.0))]
    first, last = 2.0 * 39 / 1e3, 3.0 * 54 / 1e3
    assert schedule.projected(records, "ours") == pytest.approx(170 * 10 * (first + last) / 2)
    assert schedule.projected(records[:1], "ours") is None and schedule.projected(records, "eager_bf16") is None


def test_a_small_run_is_recorded_as_extrapolated(tmp_path, monkeypatch, capsys):
    path = tmp_path / "r.jsonl"
    options = ["--device", "cpu", "--backend", "reference", "--epochs", "2", "--classifier-epochs", "1"]
    small = ["--size", "8", "--per-class", "2", "--width", "2"]
    monkeypatch.setattr(schedule, "STEPS", 2)
    monkeypatch.setattr("sys.argv", ["schedule", *options, *small, "--json", str(path), "--commit", "abc"])
    assert schedule.main() == 0
    from bench.harness.records import read

    header, record = read(path)
    assert header["facts"]["commit"] == "abc" and record["params"] == {"epochs": "extrapolated"}
    assert record["note"] == "2 and 1 epochs per stage, extrapolated; data of CIFAR-100's shape"
    assert len(record["step_seconds"]) == 2 and record["ms"] > 1e3 * record["wall_seconds"]
    assert {settled for _, stage, settled, _ in record["epoch_seconds"] if stage == "representation"} == {False, True}


def test_disagreement_of_backends_is_named():
    assert agreement.complaints(([1.0, 0.5], 90.0), ([1.01, 0.4], 92.0)) == []
    said = agreement.complaints(([1.0], 90.0), ([1.1], 85.0))
    assert "first epoch's loss is 1.0000 (reference) and 1.1000 (fused)" in said[0] and "average accuracy is 90.00 %" in said[1]
    assert agreement.complaints(([float("nan")], 90.0), ([1.0], 90.0))
