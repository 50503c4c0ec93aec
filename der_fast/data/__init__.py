"""Images and labels: loading, the in-memory source, and the transforms in front of the network."""

from __future__ import annotations

from der_fast.data.load import load_dataset
from der_fast.data.source import Batch, ImageSource, MemorySource
from der_fast.data.transform import Transform, transforms_for

__all__ = ["Batch", "ImageSource", "MemorySource", "Transform", "load_dataset", "transforms_for"]
