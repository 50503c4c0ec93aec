"""Records a CUDA graph so that a failed attempt leaves nothing behind, and the caller can continue without the graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")

_given_up: list[torch.cuda.CUDAGraph] = []
_reasons: list[str] = []


@contextmanager
def off(reason: str) -> Iterator[None]:
    """Let no graph be captured inside: `record` raises with `reason`, as where the driver refuses, and its callers launch instead."""
    _reasons.append(reason)
    try:
        yield
    finally:
        _reasons.pop()


def run_on(stream: torch.cuda.Stream, run: Callable[[], Result]) -> Result:
    """Run on `stream`, after the work queued on the current stream and before any that follows; return what `run` returns."""
    here = torch.cuda.current_stream(stream.device)
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        result = run()
    here.wait_stream(stream)
    return result


class Beside:
    """Runs work on a stream of its own while the current stream goes on; on a CPU it runs at once.

    Args:
        device: where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def start(self, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return what `run` returns, after the work queued so far; nothing may read it before `join`."""
        if self._stream is None:
            return run()
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            return run()

    def join(self, result: torch.Tensor) -> torch.Tensor:
        """Return the result of `start`, now that the current stream waits for it."""
        if self._stream is not None:
            here = torch.cuda.current_stream(self._stream.device)
            here.wait_stream(self._stream)
            result.record_stream(here)
        return result


def warm_up(run: Callable[[], object], stream: torch.cuda.Stream, times: int = 2) -> None:
    """Run on `stream` before a capture.

    A capture cannot compile kernels, choose algorithms or allocate library workspaces, so that happens here.
    """
    for _ in range(times):
        run_on(stream, run)


def record(run: Callable[[], Result], graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: Any = None) -> Result:
    """Capture what `run` launches into `graph`, on `stream`; return what it returns. A replay overwrites the tensors in that result.

    Other threads may use the device during the capture, for example to load images. `pool` is that of another graph to share memory with,
    which is safe if no result of the two is read after the other's replay.

    Raises:
        Exception: what `run` raised; if it raised nothing, a RuntimeError with the driver's reason. The current stream is restored.
        RuntimeError: captures are `off`; `run` was not called.
    """
    if _reasons:
        raise RuntimeError(_reasons[-1])
    here = torch.cuda.current_stream(stream.device)
    problems: list[Exception] = []
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            try:
                return run()
            except Exception as error:
                problems.append(error)
                raise
    except Exception as error:
        ended = bool(problems) and problems[0] is error
        if ended:
            raise
        # A capture that the driver has invalidated cannot be ended cleanly: PyTorch raises a second error that hides the first, leaves its
        # own stream as the current one, and keeps asking the graph which allocations belong to it.
        torch.cuda.set_stream(here)
        _given_up.append(graph)
        if problems:
            raise problems[0] from None
        raise
    finally:
        # The error refers to this frame and the frame to the error.
        problems.clear()
