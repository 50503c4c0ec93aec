"""Timing: median and spread of many runs, by the device's own clock.

On a GPU there are three modes, see `Case.timing`: replays of a CUDA graph, each between two events; blocks of calls from Python between two
synchronisations, launch overhead included; wall time of one run. On the CPU it is wall time of every run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from bench.harness.gate import poison
from bench.harness.registry import Case, Run, Setting, Tensors
from der_fast.kernels.capture import record, warm_up

_WARM_UP = 3
# Milliseconds spent per variant, and the number of samples taken in that time.
_BUDGET = {"full": 400.0, "quick": 120.0, "smoke": 0.0}
_FEWEST = {"full": 11, "quick": 7, "smoke": 1}
_MOST = 200


@dataclass(frozen=True)
class Timing:
    """Milliseconds per run: median, 20th and 80th percentile over `samples`, and how they were measured."""

    median: float
    p20: float
    p80: float
    samples: int
    how: str


def summary(milliseconds: Sequence[float], how: str) -> Timing:
    """Return the median and the percentiles of single measurements."""
    if len(milliseconds) == 1:
        return Timing(milliseconds[0], milliseconds[0], milliseconds[0], 1, how)
    cuts = statistics.quantiles(milliseconds, n=5, method="inclusive")
    return Timing(statistics.median(milliseconds), cuts[0], cuts[-1], len(milliseconds), how)


class Flush:
    """Empties the L2 cache by reading twice its size.

    It reads instead of writing, since written lines would have to go back to memory while the timed kernel runs.
    """

    def __init__(self, device: torch.device) -> None:
        size = int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or 64 << 20
        self._buffer = torch.zeros(2 * size // 4, dtype=torch.float32, device=device)
        self._sum = torch.zeros((), device=device)

    def __call__(self) -> None:
        """Queue the flush on the current stream."""
        torch.sum(self._buffer, dim=0, out=self._sum)


@dataclass(frozen=True)
class Graph:
    """A captured run."""

    graph: torch.cuda.CUDAGraph
    outputs: Tensors

    def __call__(self) -> Tensors:
        """Replay."""
        self.graph.replay()
        return self.outputs


def capture(run: Run, inner: int) -> Graph:
    """Capture `inner` runs in one graph, on the current stream, which must not be the default one."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()

    def several() -> Tensors:
        for _ in range(inner):
            outputs = run()
        return outputs

    warm_up(run, stream, _WARM_UP)
    return Graph(graph, record(several, graph, stream))


def replayed(run: Graph) -> Tensors:
    """Replay a graph over poisoned outputs and return what it wrote."""
    poison(run.outputs)
    return run()


def measure(runs: Sequence[Callable[[], object]], case: Case, setting: Setting, how: str) -> Timing:
    """Time runs over different inputs in turn.

    Args:
        runs: one per input set; with how = 'graph' each holds `case.inner` runs.
        case: defines what is flushed and how many runs make a sample.
        setting: device and scale.
        how: 'graph', 'launch' or 'once'.
    """
    if how == "once":
        return summary([_clocked(runs[0], setting) / case.batches], how)
    if not setting.cuda:
        return _by_clock(runs, case, setting, "cpu clock")
    return _by_events(runs, case, setting) if how == "graph" else _by_clock(runs, case, setting, how)


def _clocked(run: Callable[[], object], setting: Setting) -> float:
    _synchronise(setting)
    started = time.perf_counter()
    run()
    _synchronise(setting)
    return 1e3 * (time.perf_counter() - started)


def _synchronise(setting: Setting) -> None:
    if setting.cuda:
        torch.cuda.synchronize(setting.device)


def samples_for(estimate: float, setting: Setting) -> int:
    """Return how many samples of `estimate` milliseconds to take."""
    return int(min(max(_BUDGET[setting.scale] / max(estimate, 1e-3), _FEWEST[setting.scale]), _MOST))


def _by_events(runs: Sequence[Callable[[], object]], case: Case, setting: Setting) -> Timing:
    flush = Flush(setting.device) if case.cold else None
    for run in runs:
        run()
    count = samples_for(_clocked(runs[0], setting), setting)
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for number, (begin, end) in enumerate(pairs):
        if flush is not None:
            flush()
        begin.record()
        runs[number % len(runs)]()
        end.record()
    torch.cuda.synchronize(setting.device)
    return summary([begin.elapsed_time(end) / case.inner for begin, end in pairs], "graph")


def _by_clock(runs: Sequence[Callable[[], object]], case: Case, setting: Setting, how: str) -> Timing:
    inner = case.inner if setting.cuda else 1
    if not setting.smoke:
        for _ in range(_WARM_UP):
            runs[0]()
    estimate = _clocked(runs[0], setting) * inner
    found = []
    number = 0
    for _ in range(samples_for(estimate, setting)):
        _synchronise(setting)
        started = time.perf_counter()
        for _ in range(inner):
            runs[number % len(runs)]()
            number += 1
        _synchronise(setting)
        found.append(1e3 * (time.perf_counter() - started) / inner / case.batches)
    return summary(found, how)
