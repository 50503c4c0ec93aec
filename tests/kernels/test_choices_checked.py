"""A choice is used only after its results were compared; what fails is left out in one line; and optional measurements end."""

from __future__ import annotations

import contextlib
import logging

import pytest
import torch

from der_fast.kernels import choices, timing
from der_fast.kernels.choices import Choice, Choices, machine
from der_fast.kernels.timing import measure


def table(monkeypatch, **milliseconds):
    """Let measurements have this result, whatever the machine does."""
    monkeypatch.setattr(choices, "measure", lambda runs, device: {name: milliseconds[name] for name in runs})


def trusting(calls, **results):
    """Ways that note their name and return a number."""

    def run(name):
        calls.append(name)
        result = results[name]
        if isinstance(result, Exception):
            raise result
        return torch.tensor([float(result)])

    return {name: lambda name=name: run(name) for name in results}


def checked(store, runs, **options):
    return store.fastest("key", runs, what="sums run as", trusted=["right"], tensors=lambda result: [result], **options)


def test_a_remembered_choice_is_compared_once_per_process_and_not_timed(tmp_path, monkeypatch):
    table(monkeypatch, right=3.0, fast=1.0, slow=2.0)
    path, calls = tmp_path / "choices.json", []
    good = trusting(calls, right=1, fast=1, slow=1)
    assert checked(Choices(path), good) == "fast" and calls == ["right", "fast", "slow"]
    calls.clear()

    def never(runs, device):
        raise AssertionError("timed again")

    monkeypatch.setattr(choices, "measure", never)
    for _ in range(2):
        again = Choices(path)
        assert checked(again, good) == checked(again, good) == "fast"
    assert calls == ["right", "fast"] * 2
    pinned = Choices()
    pinned.pin({f"{machine()}|key": "slow"})
    calls.clear()
    assert checked(pinned, good) == checked(pinned, good) == "slow" and calls == ["right", "slow"]


@pytest.mark.parametrize("fault", [2, RuntimeError("no kernel image is available")])
def test_a_remembered_choice_that_has_become_wrong_is_measured_again_without_it(tmp_path, monkeypatch, caplog, fault):
    table(monkeypatch, right=3.0, fast=1.0, slow=2.0)
    path = tmp_path / "choices.json"
    assert checked(Choices(path), trusting([], right=1, fast=1, slow=1)) == "fast"
    broken = Choices(path)
    with caplog.at_level(logging.WARNING):
        assert checked(broken, trusting([], right=1, fast=fault, slow=1)) == "slow"
    (record,) = caplog.records
    assert "sums run as 'fast' is not used any more, because it" in record.getMessage()
    assert Choices(path).known("key", ("fast", "slow")) == broken.record()[f"{machine()}|key"] == "slow"


def test_what_cannot_be_compared_for_want_of_memory_is_used_as_before(tmp_path, monkeypatch, caplog):
    table(monkeypatch, right=3.0, fast=1.0)
    path, full = tmp_path / "choices.json", torch.OutOfMemoryError("CUDA out of memory")
    checked(Choices(path), trusting([], right=1, fast=1))
    with caplog.at_level(logging.WARNING):
        assert checked(Choices(path), trusting([], right=full, fast=1)) == "fast"
    (record,) = caplog.records
    assert "'fast', unchecked, because what it is compared with failed: OutOfMemoryError" in record.getMessage()


def test_what_fails_is_said_in_one_line_for_all_shapes(monkeypatch, caplog):
    table(monkeypatch, right=3.0, fast=1.0, bad=0.5, full=0.5)
    bad, full = RuntimeError("ptxas: unsupported\nand more"), torch.OutOfMemoryError("CUDA out of memory (9 GiB)")
    store = Choices()
    with caplog.at_level(logging.WARNING):
        for shape in range(3):
            runs = trusting([], right=1, bad=bad, full=full, fast=1)
            assert store.fastest(f"{shape}", runs, what="sums run as", trusted=["right"]) == "fast"
    assert [record.getMessage() for record in caplog.records] == [
        "sums run as 'bad' is not used, because it failed: RuntimeError: ptxas: unsupported",
        "sums run as 'full' is not used, because it failed: OutOfMemoryError: CUDA out of memory (9 GiB)",
    ]


def test_where_nothing_else_works_the_last_resort_is_taken_in_one_line_and_not_kept(tmp_path, monkeypatch, caplog):
    table(monkeypatch, usual=2.0, fast=1.0)
    path, broken = tmp_path / "choices.json", RuntimeError("Failed to find C compiler")
    options = {"last_resort": "right", "usual": "usual"}
    store = Choices(path)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert checked(store, trusting([], right=1, usual=broken, fast=broken), **options) == "right"
    (record,) = caplog.records
    assert record.getMessage() == (
        "sums run as 'right', because nothing else works here: 'usual' failed: RuntimeError: Failed to find C compiler"
    )
    # A run that goes on repeats itself; the next one tries again.
    assert store.record() == {f"{machine()}|key": "right"} and not path.exists()
    assert checked(Choices(path), trusting([], right=1, usual=1, fast=1), **options) == "fast"
    # It is never timed: `table` has no time for it.
    assert Choices(path).filed()[f"{machine()}|key"] == Choice("fast", {"usual": 2.0, "fast": 1.0})


def test_out_of_memory_drops_the_way_that_needs_it_wherever_it_happens(monkeypatch, caplog):
    """Compared, captured or timed: the rest of the measurement goes on."""
    device = torch.device("cuda")

    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    runs = {"usual": lambda: 2.0, "captured": lambda: 1.0, "timed": lambda: 0.5}
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(timing, "_replay", lambda run, device: full() if run() == 1.0 else run)
    monkeypatch.setattr(timing, "_gpu_milliseconds", lambda replay: full() if replay() == 0.5 else replay())
    with caplog.at_level(logging.WARNING):
        assert measure(runs, device) == {"usual": 2.0}
    assert [record.getMessage() for record in caplog.records] == [
        f"{name} is left out of a measurement, because it failed: OutOfMemoryError: CUDA out of memory" for name in ("captured", "timed")
    ]
    # A measurement that cannot be made at all ends no run that could go on.
    monkeypatch.setattr(choices, "measure", full)
    assert checked(Choices(), trusting([], right=1, usual=1, fast=1), usual="usual") == "usual"
    with pytest.raises(torch.OutOfMemoryError):
        checked(Choices(), trusting([], right=1, fast=1))


@pytest.mark.parametrize("error", [RuntimeError("operation not permitted when stream is capturing"), torch.OutOfMemoryError("CUDA")])
def test_what_cannot_be_captured_is_timed_as_it_is_unless_there_is_no_memory_for_it(monkeypatch, error):
    def record(*arguments):
        raise error

    def run():
        return None

    for name in ("CUDAGraph", "Stream", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *arguments: None)
    monkeypatch.setattr(timing.capture, "warm_up", lambda run, stream: run())
    monkeypatch.setattr(timing.capture, "record", record)
    with pytest.raises(torch.OutOfMemoryError) if isinstance(error, torch.OutOfMemoryError) else contextlib.nullcontext():
        assert timing._replay(run, torch.device("cuda")) is run


def test_what_is_optional_is_measured_for_a_bounded_time(tmp_path, monkeypatch):
    """Then the usual one is taken, and remembered, so that the next process measures nothing either."""
    clock = [0.0]
    monkeypatch.setattr(choices.time, "perf_counter", lambda: clock[0])
    table(monkeypatch, usual=2.0, fast=1.0, late=0.5)
    calls, path = [], tmp_path / "choices.json"

    def offers():
        runs = trusting(calls, right=1, usual=1, fast=1, late=1)

        def compiled(run):
            clock[0] += choices.OPTIONAL_SECONDS / 4
            return run()

        return {name: lambda run=run: compiled(run) for name, run in runs.items()}

    options = {"optional": True, "usual": "usual", "last_resort": "right", "trusted": ["right"]}
    store = Choices(path)
    assert store.fastest("first", offers(), **options) == "late" and calls == ["right", "usual", "fast", "late"]
    assert store.fastest("second", offers(), **options) == "usual" and len(calls) == 4
    # What is not optional is measured all the same.
    assert store.fastest("third", offers(), usual="usual", last_resort="right") == "late"
    # A time that runs out while measuring leaves out what was not tried.
    clock[0], calls[:] = 0.0, []
    monkeypatch.setattr(choices, "OPTIONAL_SECONDS", 3.0)
    partly = Choices()
    partly._seconds = 2.0
    assert partly.fastest("fourth", offers(), **options) == "fast" and calls == ["right", "usual", "fast"]
    partly._seconds = 0.5
    assert partly.fastest("fifth", offers(), **options) == "usual"
    monkeypatch.setattr(choices, "measure", lambda runs, device: pytest.fail("measured again"))
    assert Choices(path).fastest("first", offers(), **options) == "late"
    assert Choices(path).fastest("second", offers(), **options) == "usual"


@pytest.mark.parametrize(("given", "seconds"), [(None, 60.0), ("", 60.0), ("12.5", 12.5), ("0", 0.0), ("soon", 60.0)])
def test_the_time_for_what_has_a_default_can_be_set_from_outside(given, seconds, monkeypatch, caplog):
    monkeypatch.delenv(choices.SECONDS_FROM, raising=False)
    if given is not None:
        monkeypatch.setenv(choices.SECONDS_FROM, given)
    assert Choices()._seconds == seconds
    assert ("takes a number of seconds, not 'soon'" in caplog.text) == (given == "soon")


def test_a_changed_kernel_is_measured_again_and_one_line_says_so(tmp_path, monkeypatch, caplog):
    path, offers = tmp_path / "choices.json", dict.fromkeys(("slow", "fast"), lambda: None)
    table(monkeypatch, slow=3.0, fast=1.0)
    before = Choices(path)
    assert before.fastest("key", offers) == "fast"
    monkeypatch.setattr(choices, "fingerprint", lambda: "of another kernel")
    table(monkeypatch, slow=1.0, fast=3.0)
    after = Choices(path)
    with caplog.at_level(logging.WARNING):
        assert after.known("key", offers) is None
        assert [after.fastest(key, offers) for key in ("key", "other")] == ["slow"] * 2
    assert [record.getMessage() for record in caplog.records] == [
        f"the choices in {path} are ignored and measured again, because they were measured with other kernels"
    ]
    assert [key.split("|")[-2] for key in Choices(path).filed()][1:] == ["kernels of another kernel"] * 2
