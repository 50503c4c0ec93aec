"""The fastest way is measured once, remembered, and pinned; a bad file is as good as none, and the log says so."""

from __future__ import annotations

import errno
import json
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from filelock import FileLock, Timeout

from der_fast.kernels import choices, timing
from der_fast.kernels.choices import HYSTERESIS, Choice, Choices, cache_file, machine
from der_fast.kernels.timing import measure


def runs(calls, **seconds):
    """Ways that note their name and sleep."""

    def run(name, duration):
        calls.append(name)
        time.sleep(duration)

    return {name: lambda name=name, duration=duration: run(name, duration) for name, duration in seconds.items()}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(timing, "BUDGET", 0.002)


def table(monkeypatch, **milliseconds):
    """Let measurements have this result, whatever the machine does."""
    monkeypatch.setattr(choices, "measure", lambda runs, device: {name: milliseconds[name] for name in runs})


def test_every_way_is_run_and_timed():
    calls = []
    found = measure(runs(calls, slow=0.03, fast=0.001), torch.device("cpu"))
    assert set(calls) == set(found) == {"slow", "fast"}
    # A sleep never ends early: these bounds hold however busy the machine is.
    assert found["slow"] >= 30 and found["fast"] >= 1


def test_a_way_that_fails_is_left_out_and_named(caplog):
    def fail():
        raise RuntimeError("out of shared memory")

    with caplog.at_level(logging.WARNING):
        assert Choices().fastest("key", {"bad": fail, **runs([], good=0.0)}, usual="bad") == "good"
    assert [record.getMessage() for record in caplog.records] == [
        "bad is left out of a measurement, because it failed: RuntimeError: out of shared memory"
    ]
    with pytest.raises(RuntimeError, match="out of shared memory"):
        Choices().fastest("key", {"bad": fail})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_what_cannot_be_captured_is_timed_as_it_is():
    device = torch.device("cuda")
    small, large = (torch.ones(size, device=device) for size in (2**10, 2**28))

    def refusing():
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("no graphs today")
        return small + 1

    found = measure({"small": lambda: small + 1, "large": lambda: large + 1, "refusing": refusing}, device)
    assert set(found) == {"small", "large", "refusing"} and 0 < found["small"] < found["large"]


def test_measured_once_then_remembered_in_the_file(tmp_path, monkeypatch):
    table(monkeypatch, slow=3.0, fast=1.0)
    path, offers = tmp_path / "deep" / "choices.json", runs([], slow=0, fast=0)
    first = Choices(path)
    assert first.fastest("key", offers) == "fast"
    table(monkeypatch, slow=1.0, fast=3.0)
    assert first.fastest("key", offers) == Choices(path).fastest("key", offers) == "fast"
    assert Choices(path).fastest("other key", offers) == "slow"
    assert Choices(path).fastest("key", offers) == "fast"
    assert json.loads(path.read_text())["choices"] == {
        f"{machine()}|key": {"chosen": "fast", "milliseconds": {"slow": 3.0, "fast": 1.0}},
        f"{machine()}|other key": {"chosen": "slow", "milliseconds": {"slow": 1.0, "fast": 3.0}},
    }
    assert Choices(path).filed()[f"{machine()}|key"] == Choice("fast", {"slow": 3.0, "fast": 1.0})
    assert first.record() == {f"{machine()}|key": "fast"}


def test_a_pinned_record_stands_before_the_file(tmp_path, monkeypatch):
    table(monkeypatch, slow=3.0, fast=1.0)
    path, offers = tmp_path / "choices.json", runs([], slow=0, fast=0)
    Choices(path).fastest("key", offers)
    pinned = Choices(path)
    pinned.pin({f"{machine()}|key": "slow"})
    assert pinned.fastest("key", offers) == "slow" and pinned.record() == {f"{machine()}|key": "slow"}


def test_a_choice_made_is_kept_when_a_record_is_pinned_later(monkeypatch):
    table(monkeypatch, slow=3.0, fast=1.0)
    remembered, offers = Choices(), runs([], slow=0, fast=0)
    assert remembered.fastest("key", offers) == "fast"
    remembered.pin({f"{machine()}|key": "slow"})
    assert remembered.fastest("key", offers) == "slow"


def test_a_remembered_way_that_is_gone_is_measured_anew(tmp_path, monkeypatch):
    path = tmp_path / "choices.json"
    table(monkeypatch, slow=3.0, gone=1.0)
    assert Choices(path).fastest("key", runs([], slow=0, gone=0)) == "gone"
    table(monkeypatch, slow=3.0, fast=5.0)
    assert Choices(path).fastest("key", runs([], slow=0, fast=0)) == "slow"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"[]",
        b'{"version": 99, "choices": {}}',
        b'{"version": 2, "choices": {"of an older der_fast": {"chosen": "slow", "milliseconds": {}}}}',
        b'{"version": 3, "choices": 3}',
    ],
)
def test_a_bad_file_is_as_good_as_none_and_the_log_says_so_once(tmp_path, monkeypatch, caplog, content):
    table(monkeypatch, fast=1.0)
    path = tmp_path / "choices.json"
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        remembered = Choices(path)
        assert remembered.fastest("key", runs([], fast=0)) == remembered.fastest("other", runs([], fast=0)) == "fast"
    assert [record.getMessage().startswith(f"{path} is ignored") for record in caplog.records] == [True]
    assert set(json.loads(path.read_text())["choices"]) == {f"{machine()}|key", f"{machine()}|other"}


@pytest.mark.parametrize(
    "entry", [7, "fast", {}, {"chosen": 3, "milliseconds": {}}, {"chosen": "fast", "milliseconds": 1}, {"chosen": "fast"}]
)
def test_a_bad_entry_does_not_count(tmp_path, monkeypatch, entry):
    table(monkeypatch, fast=1.0, slow=3.0)
    path = tmp_path / "choices.json"
    path.write_text(json.dumps({"version": 3, "choices": {f"{machine()}|key": entry, "good": {"chosen": "x", "milliseconds": {}}}}))
    remembered = Choices(path)
    assert remembered.filed() == {"good": Choice("x", {})}
    assert remembered.fastest("key", runs([], fast=0, slow=0)) == "fast"
    assert Choices(path).filed() == {"good": Choice("x", {}), f"{machine()}|key": Choice("fast", {"fast": 1.0, "slow": 3.0})}


def test_no_file_is_nothing_to_speak_of(tmp_path, monkeypatch, caplog):
    table(monkeypatch, fast=1.0)
    with caplog.at_level(logging.WARNING):
        assert Choices(tmp_path / "none" / "choices.json").fastest("key", runs([], fast=0)) == "fast"
    assert caplog.records == []


@pytest.mark.parametrize(("other", "winner"), [(1.0, "usual"), (1 - HYSTERESIS, "usual"), (1 - 1.01 * HYSTERESIS, "other"), (2.0, "usual")])
def test_the_usual_way_wins_unless_another_is_clearly_faster(monkeypatch, other, winner):
    table(monkeypatch, usual=1.0, other=other)
    assert Choices().fastest("key", runs([], usual=0, other=0), usual="usual") == winner


def test_a_gpu_is_known_by_its_name_its_capability_and_the_versions(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"Some GPU {index}")
    choices._gpu.cache_clear()
    found = machine(torch.device("cuda", 3))
    choices._gpu.cache_clear()
    assert found.startswith("Some GPU 3|sm_90|")
    for words in (f"torch {torch.__version__}", "triton ", f"cuda {torch.version.cuda}", "cudnn "):
        assert words in found


def test_a_file_that_cannot_be_written_does_no_harm(tmp_path, monkeypatch):
    table(monkeypatch, fast=1.0)
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    remembered = Choices(blocked / "choices.json")
    assert remembered.fastest("key", runs([], fast=0)) == "fast"
    assert blocked.read_text() == "not a folder" and sorted(tmp_path.iterdir()) == [blocked]


def test_the_file_lies_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(choices, "cache_folder", lambda: tmp_path)
    assert cache_file() == tmp_path / "choices.json"
    monkeypatch.setattr(choices, "cache_folder", lambda: None)
    assert cache_file() is None


def test_without_a_place_for_the_file_one_line_says_so(tmp_path, monkeypatch, caplog):
    table(monkeypatch, fast=1.0)
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setattr(choices, "cache_folder", lambda: None)
    choices.shared.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            for store in (choices.shared(), Choices(blocked / "choices.json"), Choices()):
                for key in ("one", "two"):
                    assert store.fastest(key, runs([], fast=0)) == "fast"
    finally:
        choices.shared.cache_clear()
    first, second = (record.getMessage() for record in caplog.records)
    assert "is not kept, so the next run measures again: this user has no home folder; set HOME or XDG_CACHE_HOME" in first
    assert "is not kept, so the next run measures again: cannot write" in second and str(blocked) in second


def test_what_is_known_is_told_without_measuring(tmp_path, monkeypatch):
    table(monkeypatch, slow=3.0, fast=1.0)
    path, names = tmp_path / "choices.json", ("slow", "fast")
    first = Choices(path)
    assert first.known("key", names) is None and first.record() == {}
    first.fastest("key", runs([], slow=0, fast=0))
    assert first.known("key", names) == Choices(path).known("key", names) == "fast"
    assert first.known("key", ("slow",)) is None


def test_whoever_adds_at_the_same_time_loses_nothing(tmp_path, monkeypatch):
    """Each thread stands for a process: it has its own table, and a lock of its own."""
    table(monkeypatch, one=1.0, two=2.0)
    path, begin, inside, most = tmp_path / "deep" / "choices.json", threading.Barrier(6), [], []
    write = choices.write_json

    def watched(*arguments):
        inside.append(1)
        most.append(len(inside))
        write(*arguments)
        inside.pop()

    monkeypatch.setattr(choices, "write_json", watched)

    def work(number):
        begin.wait(20)
        for index in range(5):
            Choices(path).fastest(f"{number} {index}", runs([], one=0.0, two=0.0))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    wanted = {f"{machine()}|{number} {index}" for number in range(6) for index in range(5)}
    assert set(json.loads(path.read_text())["choices"]) == wanted and set(most) == {1}


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOLCK, "No locks available"),
        NotImplementedError("no flock"),
        PermissionError(13, "Permission denied"),
        Timeout("lock"),
    ],
)
def test_where_nothing_can_be_locked_it_is_written_all_the_same(tmp_path, monkeypatch, error, caplog):
    """Network drives, read-only places, a process that was stopped while it held the lock."""
    table(monkeypatch, one=1.0)

    def fail(*arguments, **keywords):
        raise error

    monkeypatch.setattr(FileLock, "acquire", fail)
    with caplog.at_level(logging.DEBUG):
        assert Choices(tmp_path / "choices.json").fastest("key", runs([], one=0.0)) == "one"
    assert Choices(tmp_path / "choices.json").known("key", {"one"}) == "one"
    assert "written without a lock" in caplog.text


def test_a_lock_that_is_held_for_ever_is_not_waited_for_that_long(tmp_path, monkeypatch):
    table(monkeypatch, one=1.0)
    monkeypatch.setattr(choices, "_PATIENCE", 0.05)
    with FileLock(tmp_path / "choices.lock"):
        Choices(tmp_path / "choices.json").fastest("key", runs([], one=0.0))
    assert Choices(tmp_path / "choices.json").known("key", {"one"}) == "one"
