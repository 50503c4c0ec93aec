"""Properties of the device that launches depend on."""

from __future__ import annotations

import torch

# An H100's: the default, and used for the CPU, so that the interpreter runs what would be launched.
H100_MULTIPROCESSORS = 132


def multiprocessors(device: torch.device) -> int:
    """Return the multiprocessors of a device; an H100's for the CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else H100_MULTIPROCESSORS


def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a device; an H100's for the CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
