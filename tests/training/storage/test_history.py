"""history.json follows a run epoch by epoch, whatever interrupts it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from der_fast import files
from der_fast.config.schema import Config
from der_fast.data import MemorySource
from der_fast.training.learner import Learner
from der_fast.training.progress import EpochRecord, Observer
from der_fast.training.run import learn_more, run_protocol
from der_fast.training.storage import history
from der_fast.training.storage.history import HistoryFile, write_history

Tiny = Callable[..., Config]
Images = Callable[..., MemorySource]
Key = tuple[int, str, int]

# Two steps of two epochs, then the classifier's two; the reference model's two are of this step, too.
EPOCHS: list[Key] = [(1, "representation", 1), (1, "representation", 2)]
EPOCHS += [(2, stage, epoch) for stage in ("representation", "classifier", "reference") for epoch in (1, 2)]


def rows_in(run: Path) -> list[Key]:
    rows = json.loads((run / "history.json").read_text())["epochs"]
    return [(row["step"], row["stage"], row["epoch"]) for row in rows]


def record(step: int = 1, epoch: int = 1) -> EpochRecord:
    return EpochRecord(step, "representation", epoch, 9, 0.5, 81.25, 0.1, None, None, 1234.5)


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "_SECONDS", 0.0)


class Watching(Observer):
    """Reads the file with every batch, as somebody beside the run may; stops the run at a point."""

    def __init__(self, run: Path, stop: Key | None = None) -> None:
        self.run, self.stop = run, stop
        self.ended: list[Key] = []
        self.seen: list[list[Key]] = []
        self.expected: list[list[Key]] = []

    def batch_ends(self, step: int, stage: str, epoch: int, *rest: Any) -> None:
        self.seen.append(rows_in(self.run))
        if (step, stage, epoch) in EPOCHS:
            self.expected.append(EPOCHS[: EPOCHS.index((step, stage, epoch))])
        if self.stop == (step, stage, epoch):
            raise KeyboardInterrupt

    def epoch_ends(self, record: EpochRecord) -> None:
        self.ended.append((record.step, record.stage, record.epoch))


def train(out: Path, tiny: Tiny, synthetic: Images, **rest: Any) -> Learner:
    config = tiny({"protocol.name": "B0-2", "method.fwt": True})
    return run_protocol(config, synthetic("abcd"), synthetic("abcd", 2, seed=1), out, **rest)


def test_every_finished_epoch_is_there_at_once(tmp_path: Path, tiny: Tiny, synthetic: Images) -> None:
    watching = Watching(tmp_path)
    learner = train(tmp_path, tiny, synthetic, observer=watching)
    assert len(watching.seen) > len(EPOCHS)
    assert watching.seen == watching.expected
    assert rows_in(tmp_path) == watching.ended == EPOCHS
    before = (tmp_path / "history.json").read_bytes()
    learner.save_results(tmp_path)
    assert (tmp_path / "history.json").read_bytes() == before


@pytest.mark.parametrize("stop", [EPOCHS[1], EPOCHS[3], EPOCHS[5], EPOCHS[7]], ids=str)
def test_epochs_that_are_trained_again_are_there_once(tmp_path: Path, tiny: Tiny, synthetic: Images, stop: Key) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, tiny, synthetic, observer=Watching(tmp_path, stop))
    assert rows_in(tmp_path) == EPOCHS[: EPOCHS.index(stop)]
    watching = Watching(tmp_path)
    train(tmp_path, tiny, synthetic, observer=watching, resume=True)
    assert watching.seen == watching.expected != []
    assert rows_in(tmp_path) == EPOCHS


def test_an_epoch_whose_checkpoint_was_not_written_is_trained_again(
    tmp_path: Path, tiny: Tiny, synthetic: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is in the file already; when the run goes on, it is not, until it ends for the second time."""

    class DieBeforeCheckpoint(Observer):
        def epoch_ends(self, record: EpochRecord) -> None:
            if (record.step, record.stage, record.epoch) == EPOCHS[3]:
                monkeypatch.setattr("der_fast.training.storage.checkpoint.save_record", killed)

    def killed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, tiny, synthetic, observer=DieBeforeCheckpoint())
    monkeypatch.undo()
    assert rows_in(tmp_path) == EPOCHS[:4]
    watching = Watching(tmp_path)
    train(tmp_path, tiny, synthetic, observer=watching, resume=True)
    assert watching.seen[0] == EPOCHS[:3]
    assert watching.ended == EPOCHS[3:]
    assert rows_in(tmp_path) == EPOCHS


def test_learning_more_is_watched_too(tmp_path: Path, tiny: Tiny, synthetic: Images) -> None:
    train(tmp_path, tiny, synthetic)
    watching = Watching(tmp_path)
    config = tiny({"protocol.name": "B0-2"})
    learn_more(tmp_path, synthetic("ef"), synthetic("abcdef", 2, seed=1), config, observer=watching)
    assert watching.seen[0] == EPOCHS
    assert watching.seen[-1] == [*EPOCHS, *watching.ended[:-1]]
    assert rows_in(tmp_path) == [*EPOCHS, *watching.ended]


def test_a_row_is_turned_into_text_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,700 epochs are 1,700 rows to be written 1,700 times."""
    texts: list[EpochRecord] = []
    original = history._row
    monkeypatch.setattr(history, "_row", lambda row: texts.append(row) or original(row))
    rows = HistoryFile(tmp_path, [record(1, epoch) for epoch in range(1, 8)], print)
    rows.go_on_from([record(2, 1)])
    for epoch in range(2, 6):
        rows.epoch_ends(record(2, epoch))
    assert len(texts) == len(rows_in(tmp_path)) == 12
    rows.go_on_from([record(2, 1)])
    assert rows_in(tmp_path)[6:] == [(1, "representation", 7), (2, "representation", 1)]


def test_fast_epochs_are_written_once_a_second_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "_SECONDS", 1.0)
    clock = iter(range(1000))
    monkeypatch.setattr(history.time, "perf_counter", lambda: next(clock) / 10)
    stores: list[int] = []
    write = history._write
    monkeypatch.setattr(history, "_write", lambda run, rows: (stores.append(len(rows)), write(run, rows))[1])
    file = HistoryFile(tmp_path, [], pytest.fail)
    for epoch in range(1, 9):
        file.epoch_ends(record(epoch=epoch))
    # A look at the clock is a tenth of a second here, and a store takes another one.
    assert stores == [1]
    file.epoch_ends(record(epoch=9))
    assert stores == [1, 9]
    file.epoch_ends(record(step=2))
    assert stores == [1, 9]
    file.flush()
    assert stores == [1, 9, 10] and rows_in(tmp_path)[-1] == (2, "representation", 1)


def test_no_epochs_at_all_are_a_table_too(tmp_path: Path) -> None:
    write_history(tmp_path, [])
    assert rows_in(tmp_path) == []


def test_a_write_that_fails_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def locked(path: Path, data: bytes) -> None:
        raise PermissionError(13, "somebody reads it")

    said: list[str] = []
    rows = HistoryFile(tmp_path, [], said.append)
    rows.go_on_from([record(1, 1)])
    with monkeypatch.context() as patch:
        patch.setattr(files, "_store", locked)
        rows.epoch_ends(record(1, 2))
        rows.epoch_ends(record(1, 3))
    assert rows_in(tmp_path) == [(1, "representation", 1)]
    assert len(said) == 1
    assert "history.json" in said[0]
    rows.epoch_ends(record(1, 4))
    assert [epoch for _, _, epoch in rows_in(tmp_path)] == [1, 2, 3, 4]
