"""What launches ask of the device."""

from __future__ import annotations

import torch

# Of an H100: where nothing was asked, and for the CPU, so that what is interpreted is what would be launched.
H100_MULTIPROCESSORS = 132


def multiprocessors(device: torch.device) -> int:
    """Return the multiprocessors of a device; an H100's for the CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else H100_MULTIPROCESSORS
