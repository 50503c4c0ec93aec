"""Recording a CUDA graph such that an attempt that fails leaves nothing behind for those who go on without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

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
    """Run on `stream`, after what is queued on the current one and before what follows on it; return what `run` returns."""
    here = torch.cuda.current_stream(stream.device)
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        result = run()
    here.wait_stream(stream)
    return result


def warm_up(run: Callable[[], object], stream: torch.cuda.Stream, times: int = 2) -> None:
    """Run on `stream`, on which a capture may follow.

    Kernels are compiled and libraries choose their algorithms and make their workspaces here, which no capture allows.
    """
    for _ in range(times):
        run_on(stream, run)


def record(run: Callable[[], Result], graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> Result:
    """Capture what `run` launches into `graph`, on `stream`; return what it returns, of which a replay writes the tensors again.

    Other threads may use the device meanwhile, to load images for instance.

    Raises:
        Exception: what `run` raised; where it raised nothing, a RuntimeError with the driver's reason. The current stream is as before.
        RuntimeError: captures are `off`; `run` was not called.
    """
    if _reasons:
        raise RuntimeError(_reasons[-1])
    here = torch.cuda.current_stream(stream.device)
    problems: list[Exception] = []
    try:
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            try:
                return run()
            except Exception as error:
                problems.append(error)
                raise
    except Exception as error:
        ended = bool(problems) and problems[0] is error
        if ended:
            raise
        # A capture that the driver has given up cannot be ended in order: PyTorch then raises a second error over the one that says why,
        # leaves its stream the current one, and goes on asking the graph whose allocations are its own.
        torch.cuda.set_stream(here)
        _given_up.append(graph)
        if problems:
            raise problems[0] from None
        raise
    finally:
        # An error holds this frame, which holds the error.
        problems.clear()
