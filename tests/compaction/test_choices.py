"""The fastest strategy is measured once, remembered, and pinned; a bad file is as good as none."""

from __future__ import annotations

import json
import time

import pytest

from der_fast.compaction import choices
from der_fast.compaction.choices import Choices, cache_file, machine, measure


def runs(calls, **seconds):
    """Strategies that note their name and sleep."""

    def run(name, duration):
        calls.append(name)
        time.sleep(duration)

    return {name: lambda name=name, duration=duration: run(name, duration) for name, duration in seconds.items()}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(choices, "BUDGET", 0.002)


def table(monkeypatch, **milliseconds):
    """Let measurements have this result, whatever the machine does."""
    monkeypatch.setattr(choices, "measure", lambda runs: {name: milliseconds[name] for name in runs})


def test_every_strategy_is_run_and_timed():
    calls = []
    found = measure(runs(calls, slow=0.03, fast=0.001))
    assert set(calls) == set(found) == {"slow", "fast"}
    # A sleep never ends early: these bounds hold however busy the machine is.
    assert found["slow"] >= 30 and found["fast"] >= 1


def test_measured_once_then_remembered_in_the_file(tmp_path, monkeypatch):
    table(monkeypatch, slow=3.0, fast=1.0)
    path, offers = tmp_path / "deep" / "choices.json", runs([], slow=0, fast=0)
    first = Choices(path)
    assert first.fastest("key", offers) == "fast"
    table(monkeypatch, slow=1.0, fast=3.0)
    assert first.fastest("key", offers) == Choices(path).fastest("key", offers) == "fast"
    assert Choices(path).fastest("other key", offers) == "slow"
    assert Choices(path).fastest("key", offers) == "fast"
    assert json.loads(path.read_text())["choices"] == {f"{machine()}|key": "fast", f"{machine()}|other key": "slow"}
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


def test_a_remembered_strategy_that_is_gone_is_measured_anew(tmp_path, monkeypatch):
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
        b'{"version": 1, "choices": 3}',
        b'{"version": 1, "choices": {"k": 7}}',
    ],
)
def test_a_bad_file_is_as_good_as_none(tmp_path, monkeypatch, content):
    table(monkeypatch, fast=1.0)
    path = tmp_path / "choices.json"
    path.write_bytes(content)
    assert Choices(path).fastest("key", runs([], fast=0)) == "fast"
    assert json.loads(path.read_text()) == {"version": 1, "choices": {f"{machine()}|key": "fast"}}


def test_a_file_that_cannot_be_written_does_no_harm(tmp_path, monkeypatch):
    table(monkeypatch, fast=1.0)
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    remembered = Choices(blocked / "choices.json")
    assert remembered.fastest("key", runs([], fast=0)) == "fast"
    assert blocked.read_text() == "not a folder" and sorted(tmp_path.iterdir()) == [blocked]


def test_the_file_lies_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(choices.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_file() == tmp_path / "der_fast" / "strategies.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_file() == tmp_path / ".cache" / "der_fast" / "strategies.json"


def test_what_is_known_is_told_without_measuring(tmp_path, monkeypatch):
    table(monkeypatch, slow=3.0, fast=1.0)
    path, names = tmp_path / "choices.json", ("slow", "fast")
    first = Choices(path)
    assert first.known("key", names) is None and first.record() == {}
    first.fastest("key", runs([], slow=0, fast=0))
    assert first.known("key", names) == Choices(path).known("key", names) == "fast"
    assert first.known("key", ("slow",)) is None
