"""Recording a CUDA graph such that an attempt that fails leaves nothing behind for those who go on without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")

_given_up: list[torch.cuda.CUDAGraph] = []


def warmed_up(run: Callable[[], object], device: torch.device, times: int = 2) -> torch.cuda.Stream:
    """Run on a stream of its own, on which a capture may follow; return the stream.

    Kernels are compiled and libraries choose their algorithms and make their workspaces here, which no capture allows.
    """
    here, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(here)
    with torch.cuda.stream(side):
        for _ in range(times):
            run()
    here.wait_stream(side)
    return side


def record(run: Callable[[], Result], graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> Result:
    """Capture what `run` launches into `graph`, on `stream`; return what it returns, of which a replay writes the tensors again.

    Other threads may use the device meanwhile, to load images for instance.

    Raises:
        Exception: what `run` raised; where it raised nothing, a RuntimeError with the driver's reason. The current stream is as before.
    """
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
