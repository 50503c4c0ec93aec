"""Measures how long each of several implementations takes on this machine."""

from __future__ import annotations

import contextlib
import logging
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from der_fast.kernels import capture
from der_fast.kernels.agreement import Run, failure

# Seconds for which each implementation is repeated after its first two runs, unless it is far behind.
BUDGET = 0.1
_FAR_BEHIND = 2.0
# For CUDA graphs: replays per sample, and samples.
_REPLAYS, _SAMPLES = 10, 9

_log = logging.getLogger(__name__)


def measure(runs: Mapping[str, Run], device: torch.device) -> dict[str, float]:
    """Return the milliseconds of every run: on a CPU the best of several, since noise only adds time; on a GPU the median.

    A run that fails is left out with a warning: a kernel that does not fit this device must not stop work that can continue without it.

    Raises:
        Exception: the first run's, if all of them fail.
    """
    problems: list[Exception] = []
    times = _measure_on_gpu(runs, device, problems) if device.type == "cuda" else _measure_on_cpu(runs, problems)
    if not times:
        raise problems[0]
    return times


def _measure_on_cpu(runs: Mapping[str, Run], problems: list[Exception]) -> dict[str, float]:
    best: dict[str, float] = {}
    for name, run in runs.items():
        with _left_out_if_it_fails(name, problems):
            # The first run also builds what the implementation keeps.
            times = [_milliseconds(run), _milliseconds(run)]
            until = time.perf_counter() + BUDGET
            while min(times) < _FAR_BEHIND * min(best.values(), default=min(times)) and time.perf_counter() < until:
                times.append(_milliseconds(run))
            best[name] = min(times)
    return best


@contextlib.contextmanager
def _left_out_if_it_fails(name: str, problems: list[Exception], forget: Iterable[dict[str, Any]] = ()) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        problems.append(error)
        for kept in forget:
            del kept[name]
        _log.warning("%s is left out of a measurement, because it %s", name, failure(error))


def _milliseconds(run: Run) -> float:
    started = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - started)


def _measure_on_gpu(runs: Mapping[str, Run], device: torch.device, problems: list[Exception]) -> dict[str, float]:
    """Time the runs in turn, so that a change of the GPU's clock affects all of them."""
    with torch.cuda.device(device):
        replays: dict[str, Run] = {}
        for name, run in runs.items():
            with _left_out_if_it_fails(name, problems):
                replays[name] = _replay(run, device)
        samples: dict[str, list[float]] = {name: [] for name in replays}
        for _ in range(_SAMPLES):
            for name in list(samples):
                with _left_out_if_it_fails(name, problems, forget=(samples, replays)):
                    samples[name].append(_gpu_milliseconds(replays[name]))
    return {name: statistics.median(times) for name, times in samples.items()}


def _replay(run: Run, device: torch.device) -> Run:
    """Return the run as a CUDA graph, so that launches cost nothing, as in training; return it unchanged if it cannot be captured."""
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    capture.warm_up(run, side)
    try:
        capture.record(run, graph, side)
    except torch.OutOfMemoryError:
        # Timed launch by launch, it would look slower than it is.
        torch.cuda.synchronize(device)
        raise
    except RuntimeError:
        torch.cuda.synchronize(device)
        return run
    return graph.replay


def _gpu_milliseconds(replay: Run) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    replay()
    begin.record()
    for _ in range(_REPLAYS):
        replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / _REPLAYS
