"""Signals: noted while work is deferred, raised where it can stop, at once the second time; nobody else's handler is touched."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from der_fast import stopping
from der_fast.stopping import Stopped, deferred, heeding, requested, stop_if_requested

SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))


@pytest.fixture(autouse=True)
def usual_handlers() -> Iterator[None]:
    """What a program finds that was started from a terminal; a test run in the background of a shell has interrupts switched off."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in SIGNALS[1:]:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_waits_for_a_place_to_stop(number: signal.Signals) -> None:
    said: list[str] = []
    done = []
    with heeding(said.append, terminate=True), pytest.raises(Stopped) as caught, deferred():
        signal.raise_signal(number)
        done.append("the batch")
        assert requested()
        stop_if_requested()
        done.append("the next batch")
    assert done == ["the batch"]
    assert caught.value.signal == number and isinstance(caught.value, KeyboardInterrupt)
    assert len(said) == 1 and "a second signal stops at once" in said[0]
    assert not requested()


def test_a_signal_waits_no_longer_than_the_outermost_deferral() -> None:
    done = []
    with heeding(lambda text: None), pytest.raises(Stopped):
        with deferred():
            with deferred():
                signal.raise_signal(signal.SIGINT)
            done.append("outer")
        done.append("after")
    assert done == ["outer"]


def test_a_second_signal_stops_at_once() -> None:
    done = []
    with heeding(lambda text: None), pytest.raises(Stopped), deferred():
        signal.raise_signal(signal.SIGINT)
        done.append("first")
        signal.raise_signal(signal.SIGINT)
        done.append("second")
    assert done == ["first"]


def test_outside_a_deferral_a_signal_stops_at_once_and_says_nothing() -> None:
    said: list[str] = []
    with heeding(said.append), pytest.raises(Stopped):
        signal.raise_signal(signal.SIGINT)
        pytest.fail("went on")
    assert said == []


def test_what_fails_after_a_signal_counts_as_stopped() -> None:
    with heeding(lambda text: None), pytest.raises(Stopped) as caught, deferred():
        signal.raise_signal(signal.SIGINT)
        raise OSError("a worker is gone")
    assert isinstance(caught.value.__cause__, OSError)
    with heeding(lambda text: None), pytest.raises(OSError, match="no signal"), deferred():
        raise OSError("no signal")


def test_a_message_that_cannot_be_written_stops_nothing() -> None:
    def say(text: str) -> None:
        raise RuntimeError("reentrant call inside <_io.BufferedWriter>")

    with heeding(say), pytest.raises(Stopped), deferred():
        signal.raise_signal(signal.SIGINT)


def test_handlers_are_as_before_afterwards() -> None:
    with heeding(lambda text: None, terminate=True):
        assert signal.getsignal(signal.SIGINT) != signal.default_int_handler
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
        with heeding(lambda text: None):
            pass
        assert signal.getsignal(signal.SIGINT) != signal.default_int_handler
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_sigterm_is_only_taken_on_request() -> None:
    with heeding(lambda text: None):
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("own", [signal.SIG_IGN, lambda number, frame: None])
def test_a_handler_of_the_callers_own_stays(own: object, number: signal.Signals) -> None:
    signal.signal(number, own)  # type: ignore[arg-type]
    with heeding(lambda text: None, terminate=True), deferred():
        assert signal.getsignal(number) is own
        signal.raise_signal(number)
        assert not requested()
    assert signal.getsignal(number) is own


def test_other_threads_change_nothing_and_are_not_asked() -> None:
    found: list[object] = []

    def work() -> None:
        with heeding(lambda text: None, terminate=True):
            found.append(signal.getsignal(signal.SIGINT) is signal.default_int_handler)

    def ask() -> None:
        with deferred():
            stop_if_requested()
        found.append(requested())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    with heeding(lambda text: None), pytest.raises(Stopped), deferred():
        signal.raise_signal(signal.SIGINT)
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
    assert found == [True, False]


@pytest.mark.skipif(not hasattr(signal, "SIGCHLD"), reason="the system does not tell parents of children")
def test_a_worker_that_the_same_signal_ends_does_not_end_the_batch() -> None:
    def raising(number: int, frame: object) -> None:
        raise RuntimeError("DataLoader worker is killed by signal: Terminated.")

    before = signal.signal(signal.SIGCHLD, raising)
    try:
        done = []
        with heeding(lambda text: None, terminate=True), pytest.raises(Stopped), deferred():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGCHLD)
            done.append("the batch")
        assert done == ["the batch"] and signal.getsignal(signal.SIGCHLD) is raising
    finally:
        signal.signal(signal.SIGCHLD, before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork")
@pytest.mark.parametrize(("number", "ended"), [(signal.SIGINT, 0), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_fork_leaves_interrupts_to_its_parent_and_ends_when_it_is_told_to(number: signal.Signals, ended: int) -> None:
    code = (
        "import os, signal\nfrom der_fast.stopping import heeding\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "with heeding(print, terminate=True):\n    child = os.fork()\n"
        f"    if child == 0:\n        signal.raise_signal({int(number)})\n        os._exit(0)\n"
        "    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == ended


def test_importing_the_package_installs_nothing() -> None:
    code = (
        "import signal; before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]\n"
        "import der_fast, der_fast.stopping, der_fast.api, der_fast.cli.main\n"
        "print(before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "True\n"
    assert stopping._watch is None
