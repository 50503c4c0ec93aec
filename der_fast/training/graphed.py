"""A function of a batch on static tensors: launched kernel by kernel at first, replayed as one CUDA graph from then on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from der_fast.kernels import capture

# Eager batches before the capture: in them kernels are compiled, paths are measured, and libraries allocate their workspaces.
WARM_UP = 3

Body = Callable[..., None]
_Shape = tuple[tuple[torch.Size, torch.dtype, torch.device], ...]


@dataclass
class _OneShape:
    """Batches of one shape: the tensors that hold them, how many there were, and their graph."""

    tensors: tuple[Tensor, ...]
    runs: int = 0
    graph: torch.cuda.CUDAGraph | None = None


class GraphedStep:
    """Calls a body with static tensors that hold the batch.

    Every shape, such as that of an epoch's smaller last batch, has its own graph, captured after `WARM_UP` batches of that shape, all of
    which count: the body is the same function in both forms, and a capture runs nothing. The graphs share their memory. Everything else
    that the body reads, numbers included, must stay at the same address.

    Args:
        device: where the body runs; without CUDA it always runs eagerly.
        say: called once with the reason if no graph can be captured.
    """

    # The body is not stored: its owner holds this object, and in a reference cycle a graph's memory would outlive both.
    def __init__(self, device: torch.device, say: Callable[[str], None]) -> None:
        self.device, self.say = device, say
        self._shapes: dict[_Shape, _OneShape] = {}
        self._stream: torch.cuda.Stream | None = None
        self._captures = device.type == "cuda"

    @property
    def captured(self) -> int:
        """How many shapes are replayed."""
        return sum(shape.graph is not None for shape in self._shapes.values())

    def __call__(self, body: Body, *tensors: Tensor) -> None:
        """Run the body on a batch.

        Args:
            body: the same function every time; reads nothing from the device and returns nothing.
            tensors: the batch.
        """
        key = tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in tensors)
        if key not in self._shapes:
            self._shapes[key] = _OneShape(tuple(torch.empty_like(tensor) for tensor in tensors))
        shape = self._shapes[key]
        for buffer, value in zip(shape.tensors, tensors, strict=True):
            buffer.copy_(value, non_blocking=True)
        if shape.graph is None and self._captures and shape.runs >= WARM_UP:
            shape.graph = self._capture(body, shape.tensors)
        if shape.graph is None:
            self._eagerly(body, shape.tensors)
        else:
            shape.graph.replay()
        shape.runs += 1

    def _eagerly(self, body: Body, tensors: tuple[Tensor, ...]) -> None:
        if not self._captures:
            body(*tensors)
            return
        # Work that a graph will hold must not start on the default stream: a capture may not wait for it.
        capture.run_on(self._side(), lambda: body(*tensors))

    def _side(self) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        return self._stream

    def _capture(self, body: Body, tensors: tuple[Tensor, ...]) -> torch.cuda.CUDAGraph | None:
        graph = self._new_graph()
        try:
            self._record(graph, body, tensors)
        except RuntimeError as error:
            self._captures = False
            reason = str(error).strip().partition("\n")[0]
            self.say(f"training steps are launched kernel by kernel, because no CUDA graph could be captured: {reason}")
            return None
        return graph

    def _new_graph(self) -> torch.cuda.CUDAGraph:
        return torch.cuda.CUDAGraph()

    def _record(self, graph: torch.cuda.CUDAGraph, body: Body, tensors: tuple[Tensor, ...]) -> None:
        # Nothing in a graph's memory outlives its replay, so the next one may use it.
        pool = next((shape.graph.pool() for shape in self._shapes.values() if shape.graph is not None), None)
        capture.record(lambda: body(*tensors), graph, self._side(), pool)
