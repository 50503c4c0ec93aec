"""A function of a batch on static tensors: launched kernel by kernel at first, replayed as one CUDA graph from then on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from der_fast.kernels import capture

# Eager batches before the capture: in them kernels are compiled, paths are measured, and libraries allocate their workspaces.
WARM_UP = 3

Body = Callable[[Tensor, Tensor], None]


class GraphedStep:
    """Calls a body with static tensors that hold the batch.

    The first shape is captured after `WARM_UP` batches, all of which count: the body is the same function in both forms, and a capture
    runs nothing. Batches of other shapes, such as an epoch's last one, run eagerly. Everything else that the body reads, numbers
    included, must stay at the same address.

    Args:
        device: where the body runs; without CUDA it always runs eagerly.
        say: called once with the reason if no graph can be captured.
    """

    # The body is not stored: its owner holds this object, and in a reference cycle a graph's memory would outlive both.
    def __init__(self, device: torch.device, say: Callable[[str], None]) -> None:
        self.device, self.say = device, say
        self._static: tuple[Tensor, Tensor] | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._runs = 0
        self._stream: torch.cuda.Stream | None = None
        self._captures = device.type == "cuda"

    @property
    def captured(self) -> bool:
        """Whether batches of the first shape are replayed."""
        return self._graph is not None

    def __call__(self, body: Body, images: Tensor, labels: Tensor) -> None:
        """Run the body on a batch.

        Args:
            body: the same function every time; reads nothing from the device and returns nothing.
            images, labels: the batch.
        """
        static = self._static = self._static or (torch.empty_like(images), torch.empty_like(labels))
        if not (_alike(images, static[0]) and _alike(labels, static[1])):
            self._eagerly(body, images, labels)
            return
        for buffer, value in zip(static, (images, labels), strict=True):
            buffer.copy_(value, non_blocking=True)
        if self._graph is None and self._captures and self._runs >= WARM_UP:
            self._graph = self._capture(body, *static)
        if self._graph is None:
            self._eagerly(body, *static)
        else:
            self._graph.replay()
        self._runs += 1

    def _eagerly(self, body: Body, images: Tensor, labels: Tensor) -> None:
        if not self._captures:
            body(images, labels)
            return
        # Work that a graph will hold must not start on the default stream: a capture may not wait for it.
        side = self._side()
        capture.run_on(side, lambda: body(images, labels))
        for tensor in (images, labels):
            tensor.record_stream(side)

    def _side(self) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        return self._stream

    def _capture(self, body: Body, images: Tensor, labels: Tensor) -> torch.cuda.CUDAGraph | None:
        graph = self._new_graph()
        try:
            self._record(graph, body, images, labels)
        except RuntimeError as error:
            self._captures = False
            reason = str(error).strip().partition("\n")[0]
            self.say(f"training steps are launched kernel by kernel, because no CUDA graph could be captured: {reason}")
            return None
        return graph

    def _new_graph(self) -> torch.cuda.CUDAGraph:
        return torch.cuda.CUDAGraph()

    def _record(self, graph: torch.cuda.CUDAGraph, body: Body, images: Tensor, labels: Tensor) -> None:
        capture.record(lambda: body(images, labels), graph, self._side())


def _alike(tensor: Tensor, other: Tensor) -> bool:
    return tensor.shape == other.shape and tensor.dtype == other.dtype and tensor.device == other.device
