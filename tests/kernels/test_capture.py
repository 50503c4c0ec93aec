"""Recording a CUDA graph: an attempt that fails says why and leaves the current stream as it was. PyTorch's part is played here."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from der_fast.kernels import capture

SIDE = SimpleNamespace(device="cuda:0", name="side")


class Device:
    """Does what `torch.cuda.graph` does with streams and errors: where the driver gave up, ending raises, and its stream stays current."""

    def __init__(self) -> None:
        self.current = SimpleNamespace(device="cuda:0", name="default")
        self.refused = False
        self.modes: list[str] = []
        self.pools: list[object] = []

    def set_stream(self, stream):
        self.current = stream

    def graph(self, graph, *, pool, stream, capture_error_mode):
        self.modes.append(capture_error_mode)
        self.pools.append(pool)
        device = self

        class Recording:
            def __enter__(self):
                self.before, device.current = device.current, stream

            def __exit__(self, *args):
                if device.refused:
                    raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
                device.current = self.before

        return Recording()


@pytest.fixture
def device(monkeypatch):
    played = Device()
    monkeypatch.setattr(torch.cuda, "graph", played.graph)
    monkeypatch.setattr(torch.cuda, "set_stream", played.set_stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: played.current)
    return played


def test_it_runs_on_the_stream_and_returns_what_was_made(device):
    assert capture.record(lambda: device.current.name, object(), SIDE) == "side"
    assert capture.record(lambda: device.current.name, object(), SIDE, (0, 7)) == "side"
    assert device.pools == [None, (0, 7)]
    assert device.current.name == "default"
    # Threads that load images may allocate meanwhile.
    assert device.modes == ["thread_local"] * 2


def test_a_refusal_says_what_was_refused_and_leaves_no_stream_behind(device):
    def asks():
        device.refused = True
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    graph = object()
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        capture.record(asks, graph, SIDE)
    assert device.current.name == "default" and capture._given_up[-1] is graph


def test_a_refusal_that_only_the_end_shows(device):
    def silent():
        device.refused = True

    with pytest.raises(RuntimeError, match="previous error during capture"):
        capture.record(silent, object(), SIDE)
    assert device.current.name == "default"


def test_errors_of_the_run_are_its_own(device):
    def wrong():
        device.refused = True
        raise ValueError("a batch without images")

    with pytest.raises(ValueError, match="a batch without images"):
        capture.record(wrong, object(), SIDE)
    assert device.current.name == "default"


def test_while_it_is_off_nothing_runs_and_nothing_is_captured(device):
    with capture.off("a checker watches"), pytest.raises(RuntimeError, match="a checker watches"):
        capture.record(lambda: pytest.fail("it ran"), object(), SIDE)
    assert device.modes == [] and device.current.name == "default"
    assert capture.record(lambda: "again", object(), SIDE) == "again"


REFUSED = """
import torch
from der_fast.kernels import capture

here, side = torch.cuda.current_stream(), torch.cuda.Stream()
values = torch.ones(4, device="cuda")
try:
    capture.record(lambda: values.sum().item(), torch.cuda.CUDAGraph(), side)
except RuntimeError as error:
    print(error)
assert torch.cuda.current_stream() == here
graph = torch.cuda.CUDAGraph()
doubled = capture.record(lambda: 2 * values, graph, side)
values.fill_(3)
graph.replay()
print(doubled.tolist())
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_what_the_driver_refuses():
    # In a process of its own, for PyTorch's allocator remembers a refusal.
    done = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "captur" in done.stdout and done.stdout.splitlines()[-1] == "[6.0, 6.0, 6.0, 6.0]"


def test_work_beside_the_current_stream_waits_for_what_came_before_and_is_waited_for(monkeypatch):
    done: list[str] = []

    class Stream:
        device = "cuda:0"

        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            done.append(f"{self.name} waits for {other.name}")

    class On:
        def __init__(self, stream):
            self.stream = stream

        def __enter__(self):
            self.before, here[0] = here[0], self.stream

        def __exit__(self, *args):
            here[0] = self.before

    here = [Stream("main")]
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch.cuda, "stream", On)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: here[0])
    beside = capture.Beside(torch.device("cuda"))
    result = SimpleNamespace(record_stream=lambda stream: done.append(f"used by {stream.name}"))

    def work():
        done.append(f"work on {here[0].name}")
        return result

    assert beside.start(work) is result
    done.append(f"more on {here[0].name}")
    assert beside.join(result) is result
    assert done == ["side waits for main", "work on side", "more on main", "main waits for side", "used by main"]
    assert capture.Beside(torch.device("cpu")).start(lambda: here[0].name) == "main"
