"""Ctrl-C anywhere in a step: what was learned is written down, and the run goes on from there to the same end, bit for bit."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from der_fast import api
from der_fast.config.schema import Config
from der_fast.data import MemorySource
from der_fast.errors import DataError
from der_fast.stopping import Stopped
from der_fast.training import learner as learners
from der_fast.training import rehearsal as rehearsals
from der_fast.training import run as runs
from der_fast.training.learner import Learner
from der_fast.training.methods.der import method as der
from der_fast.training.progress import Observer
from der_fast.training.run import learn_more, run_protocol

Tiny = Callable[..., Config]
Images = Callable[..., MemorySource]
Facts = Callable[[Path], dict[str, Any]]

NAMES = runpy.run_path(str(Path(__file__).with_name("test_mid_epoch.py")))
# No checkpoint within an epoch but where a signal asks for one.
KEYS = {**NAMES["KEYS"], "runtime.checkpoint_seconds": 0, "method.fwt": True}
# With the reference model of step 2, which forward transfer is measured against.
EVENTS = [*NAMES["EVENTS"], *((2, "reference", epoch, batch) for epoch in (1, 2, 3) for batch in range(1, 6))]
PHOTOS = runpy.run_path(str(Path(__file__).with_name("killed_photos.py")))
WRITE = runpy.run_path(str(Path(__file__).with_name("test_photo_resume.py")))["write"]
STOPPED = Path(__file__).with_name("stopped_photos.py")


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """A test run in the background of a shell has interrupts switched off."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Interrupting(Observer):
    """Notes the batches that it is told of, and presses Ctrl-C in one of them."""

    def __init__(self, number: int | None = None, times: int = 1) -> None:
        self.number, self.times = number, times
        self.seen: list[tuple[Any, ...]] = []
        self.messages: list[str] = []

    def batch_ends(self, step: int, stage: str, epoch: int, epochs: int, batch: int, batches: int, images: int) -> None:
        self.seen.append((step, stage, epoch, batch))
        if len(self.seen) == self.number:
            for _ in range(self.times):
                signal.raise_signal(signal.SIGINT)

    def message(self, text: str) -> None:
        self.messages.append(text)


def run(out: Path | None, tiny: Tiny, synthetic: Images, **rest: Any) -> Learner:
    return run_protocol(tiny(KEYS), synthetic("abcd"), synthetic("abcd", 2, seed=1), out, **rest)


@pytest.fixture(scope="module")
def straight(tiny: Tiny, synthetic: Images, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    out, observer = tmp_path_factory.mktemp("straight") / "run", Interrupting()
    run(out, tiny, synthetic, observer=observer)
    assert observer.seen == EVENTS
    return out


# The first batch of all, the last one of an epoch, in the middle of one with open and with binary masks, the last one of the stage, the
# first, a middle and the last one of the classifier stage.
@pytest.mark.parametrize("number", [1, 3, 5, 11, 22, 24, 25, 30, 32])
def test_after_the_running_batch(number: int, straight: Path, tmp_path: Path, tiny: Tiny, synthetic: Images, run_facts: Facts) -> None:
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt) as caught:
        run(out, tiny, synthetic, observer=(observer := Interrupting(number)))
    assert isinstance(caught.value, Stopped) and observer.seen == EVENTS[:number]
    assert sum("a second signal stops at once" in text for text in observer.messages) == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    run(out, tiny, synthetic, resume=True, observer=(observer := Interrupting()))
    assert observer.seen == EVENTS[number:]
    assert run_facts(out) == run_facts(straight)
    assert not list(out.glob("checkpoints/*"))


def test_in_every_batch(straight: Path, tmp_path: Path, tiny: Tiny, synthetic: Images, run_facts: Facts) -> None:
    out = tmp_path / "run"
    for begun in range(len(NAMES["EVENTS"])):
        with pytest.raises(Stopped):
            run(out, tiny, synthetic, resume=begun > 0, observer=(observer := Interrupting(1)))
        assert observer.seen == EVENTS[begun : begun + 1]
    run(out, tiny, synthetic, resume=True)
    assert run_facts(out) == run_facts(straight)


def before(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, step: int) -> None:
    """Press Ctrl-C as `owner.name` is called in a step."""
    original, calls = getattr(owner, name), []

    def replaced(*arguments: Any, **rest: Any) -> Any:
        calls.append(1)
        if len(calls) == step:
            signal.raise_signal(signal.SIGINT)
        return original(*arguments, **rest)

    monkeypatch.setattr(owner, name, replaced)


# Where Ctrl-C comes between the stages, and what of step 2 is learned again after it.
BETWEEN = {
    "as a step begins": (runs.Learner, "_learn", 9),
    "as masks settle for good": (der, "_end_representation", 24),
    "in herding": (rehearsals, "herding", 24),
    "in the measurement": (learners, "measure", 32),
    "while it is saved": (learners.saved, "save_model", 47),
    "as checkpoints are deleted": (runs.Checkpoints, "clear", 47),
}


@pytest.mark.parametrize("place", BETWEEN)
def test_between_the_stages(
    place: str, straight: Path, tmp_path: Path, tiny: Tiny, synthetic: Images, run_facts: Facts, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name, learned = BETWEEN[place]
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        # Herding is called once a class; the third one is of step 2.
        before(patch, owner, name, 3 if name == "herding" else 2)
        with pytest.raises(Stopped):
            run(out, tiny, synthetic, observer=(observer := Interrupting()))
    run(out, tiny, synthetic, resume=True, observer=(again := Interrupting()))
    # What is repeated is the reference model, of which nothing is kept, where the step was not saved yet.
    assert (observer.seen[:learned], again.seen) == (EVENTS[:learned], EVENTS[learned:])
    assert run_facts(out) == run_facts(straight)


def test_in_the_reference_model(straight: Path, tmp_path: Path, tiny: Tiny, synthetic: Images, run_facts: Facts) -> None:
    out, number = tmp_path / "run", len(NAMES["EVENTS"])
    with pytest.raises(Stopped):
        run(out, tiny, synthetic, observer=(observer := Interrupting(number + 3)))
    assert observer.seen == EVENTS[: number + 3]
    run(out, tiny, synthetic, resume=True, observer=(observer := Interrupting()))
    assert observer.seen == EVENTS[number:]
    assert run_facts(out) == run_facts(straight)


def test_a_second_signal_does_not_wait(tmp_path: Path, tiny: Tiny, synthetic: Images, straight: Path, run_facts: Facts) -> None:
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(out, tiny, synthetic, observer=(observer := Interrupting(5, times=2)))
    assert observer.seen == EVENTS[:5]
    assert [path.name for path in out.glob("checkpoints/*.json")] == ["001-1-representation-0001.json"]
    run(out, tiny, synthetic, resume=True, observer=(observer := Interrupting()))
    assert observer.seen == EVENTS[3:]
    assert run_facts(out) == run_facts(straight)


def test_without_a_folder_the_interrupt_reaches_the_caller(tiny: Tiny, synthetic: Images) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(None, tiny, synthetic, observer=(observer := Interrupting(2)))
    assert observer.seen == EVENTS[:2]


def test_learning_more_goes_on_by_the_same_call(straight: Path, tmp_path: Path, tiny: Tiny, synthetic: Images, run_facts: Facts) -> None:
    config, images, test = tiny({**KEYS, "method.fwt": False}), synthetic("ef"), synthetic("abcdef", 2, seed=1)
    outs = [tmp_path / "interrupted", tmp_path / "not"]
    for out in outs:
        run(out, tiny, synthetic)
    before = run_facts(outs[0])
    with pytest.raises(Stopped):
        learn_more(outs[0], images, test, config, observer=(first := Interrupting(2)))
    assert {**run_facts(outs[0])["files"], **before["files"]} == run_facts(outs[0])["files"]
    learn_more(outs[0], images, test, config, observer=(second := Interrupting()))
    learn_more(outs[1], images, test, config, observer=(whole := Interrupting()))
    assert [*first.seen, *second.seen] == whole.seen and len(first.seen) == 2
    assert run_facts(outs[0]) == run_facts(outs[1])


def test_a_loader_whose_workers_the_signal_ended_stops_after_the_batch_before(
    tmp_path: Path, tiny: Tiny, synthetic: Images, straight: Path, run_facts: Facts, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = MemorySource.batches
    passes: list[int] = []

    def failing(self: MemorySource, *arguments: Any, **rest: Any) -> Iterator[Any]:
        passes.append(1)
        for number, batch in enumerate(original(self, *arguments, **rest)):
            if len(passes) == 1 and number == 2:
                signal.raise_signal(signal.SIGINT)
                raise DataError("reading images failed: DataLoader worker (pid 1) exited unexpectedly")
            yield batch

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(MemorySource, "batches", failing)
        with pytest.raises(Stopped):
            run(out, tiny, synthetic, observer=(observer := Interrupting()))
    assert observer.seen == EVENTS[:2]
    run(out, tiny, synthetic, resume=True, observer=(observer := Interrupting()))
    assert observer.seen == EVENTS[2:]
    assert run_facts(out) == run_facts(straight)


def test_other_threads_train_through(tmp_path: Path, tiny: Tiny, synthetic: Images, straight: Path, run_facts: Facts) -> None:
    """A thread of the caller's takes no signal, and one that the main thread takes is not for it."""
    out = tmp_path / "run"
    thread = threading.Thread(target=run, args=(out, tiny, synthetic))
    thread.start()
    thread.join()
    assert run_facts(out) == run_facts(straight)


def test_a_folder_where_nothing_was_begun_is_begun(tmp_path: Path, tiny: Tiny, synthetic: Images, straight: Path, run_facts: Facts) -> None:
    out = tmp_path / "run"
    out.mkdir()
    for name in ("absent", "empty"):
        observer = Interrupting()
        folder = out if name == "empty" else tmp_path / name
        run(folder, tiny, synthetic, resume=True, observer=observer)
        assert f"there is no run in {folder} yet: starting one" in observer.messages
        assert run_facts(folder) == run_facts(straight)
    run(out, tiny, synthetic, resume=True, observer=(observer := Interrupting()))
    assert not any("there is no run" in text for text in observer.messages)


def test_the_caller_of_the_api_gets_the_interrupt_and_may_go_on(tmp_path: Path, tiny: Tiny, synthetic: Images) -> None:
    data, out = (synthetic("abcd"), synthetic("abcd", 2, seed=1)), tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        api.train(data, "B0-2", out=out, config=tiny(KEYS), observer=Interrupting(4))
    assert (out / "checkpoints" / "001-1-representation-0001-00000001.json").is_file()
    observer = Interrupting()
    api.train(data, "B0-2", out=out, config=tiny(KEYS), resume=True, observer=observer)
    assert observer.seen == EVENTS[4:]


@pytest.mark.skipif(os.name != "posix", reason="sends signals to a group of processes")
@pytest.mark.parametrize("reader", PHOTOS["READERS"])
def test_photos_in_files_and_all_of_the_processes_that_read_them(reader: str, tmp_path: Path, run_facts: Facts) -> None:
    if reader == "dali":
        pytest.importorskip("nvidia.dali", reason="needs nvidia-dali (the extra 'dali'), which has no package for this system or Python")
    WRITE(tmp_path / "images")
    ended = subprocess.run(
        [sys.executable, STOPPED, tmp_path, reader], capture_output=True, text=True, check=False, timeout=200, start_new_session=True
    )
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    places = json.loads(ended.stdout)
    keys = {**PHOTOS["READERS"][reader], "runtime.checkpoint_seconds": 0}
    PHOTOS["learn"](tmp_path, "straight", keys, (straight := Interrupting()))
    seen = Interrupting()
    PHOTOS["learn"](tmp_path, "run", keys, seen, resume=True)
    assert [*map(tuple, places), *seen.seen] == straight.seen
    wanted, found = run_facts(tmp_path / "straight"), run_facts(tmp_path / "run")
    assert (found["files"], found["history"]) == (wanted["files"], wanted["history"])
