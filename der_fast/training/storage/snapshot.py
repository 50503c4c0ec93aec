"""Tensors as they are now, on the host, although training goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Snapshot:
    """Copies that may still be on their way from a GPU.

    Args:
        copies: on the CPU, by name; complete once every event has happened.
        events: one per GPU.
    """

    copies: dict[str, Tensor]
    events: tuple[torch.cuda.Event, ...] = ()

    def tensors(self) -> dict[str, Tensor]:
        """Wait for the copies and return them, contiguous."""
        for event in self.events:
            event.synchronize()
        return self.copies


def snapshot(tensors: Mapping[str, Tensor]) -> Snapshot:
    """Copy tensors without making training wait for the host.

    On a GPU they are copied within its memory first, in the order of the work that was queued before; the way to the host is then a
    stream of its own, so that the next batch may write to them at once.
    """
    copies = {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    events = []
    for device in {value.device for value in copies.values() if value.is_cuda}:
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for name, value in copies.items():
                if value.device == device:
                    host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
                    copies[name] = host.copy_(value, non_blocking=True)
                    # The memory is not handed out again before the copy is done.
                    value.record_stream(stream)
            events.append(stream.record_event())
    return Snapshot(copies, tuple(events))
