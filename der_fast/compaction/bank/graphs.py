"""Extractors on a GPU: branches that run in parallel, captured once per image shape and replayed."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from der_fast.kernels import capture

_log = logging.getLogger(__name__)
# A run has two shapes, a full batch and the smaller last one, in training and in evaluation.
_KEPT = 4
_STREAMS = 8

Branch = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    images: Tensor
    features: Tensor


def run_beside(works: Sequence[Callable[[], Tensor]], streams: Sequence[torch.cuda.Stream]) -> list[Tensor]:
    """Return the results of all pieces of work, which run in parallel, assigned to the streams in turn."""
    here = torch.cuda.current_stream(streams[0].device)
    found: list[Tensor] = []
    for stream in streams:
        stream.wait_stream(here)
    for number, work in enumerate(works):
        with torch.cuda.stream(streams[number % len(streams)]):
            found.append(work())
    for stream in streams:
        here.wait_stream(stream)
    for result in found:
        result.record_stream(here)
    return found


def run_parallel(branches: Sequence[Branch], images: Tensor, streams: Sequence[torch.cuda.Stream]) -> Tensor:
    """Return the outputs of all branches, side by side in the channels; see `run_beside`."""
    found = run_beside([partial(branch, images) for branch in branches], streams)
    return found[0] if len(found) == 1 else torch.cat(found, 1)


def _stream(images: Tensor) -> torch.cuda.Stream:
    return torch.cuda.Stream(images.device)  # type: ignore[no-untyped-call]


class GraphedBranches:
    """Runs branches as one CUDA graph per shape and dtype of the images, or eagerly if no graph can be captured.

    Args:
        branches: functions of images on one device, without gradients; they read weights where these lie at capture.
    """

    def __init__(self, branches: Sequence[Branch]) -> None:
        self.branches = list(branches)
        self._captured: OrderedDict[tuple[object, ...], _Captured] = OrderedDict()
        self._streams: list[torch.cuda.Stream] = []
        self._eager = False

    def __call__(self, images: Tensor) -> Tensor:
        """Return the features of all branches side by side; the caller owns them."""
        if not self._streams:
            self._streams = [_stream(images) for _ in range(min(len(self.branches), _STREAMS))]
        # Inside another capture the branches become part of that graph.
        if self._eager or torch.cuda.is_current_stream_capturing():
            return run_parallel(self.branches, images, self._streams)
        key = (images.shape, images.dtype, images.device, images.stride())
        if key not in self._captured:
            try:
                self._captured[key] = self._capture(images)
            except RuntimeError as error:
                self._eager = True
                _log.warning("the frozen extractors run without a CUDA graph, because it could not be captured: %s", error)
                return run_parallel(self.branches, images, self._streams)
            if len(self._captured) > _KEPT:
                self._captured.popitem(last=False)
        self._captured.move_to_end(key)
        captured = self._captured[key]
        captured.images.copy_(images)
        captured.graph.replay()
        # The next replay overwrites its output.
        return captured.features.clone()

    def forget(self) -> None:
        """Free the memory of all captured graphs; they are captured again when needed."""
        self._captured.clear()

    def _capture(self, images: Tensor) -> _Captured:
        static = torch.empty_strided(images.shape, images.stride(), dtype=images.dtype, device=images.device)
        static.copy_(images)

        def run() -> Tensor:
            return run_parallel(self.branches, static, self._streams)

        graph, side = torch.cuda.CUDAGraph(), _stream(images)
        capture.warm_up(run, side)
        features = capture.record(run, graph, side)
        return _Captured(graph, static, features)
