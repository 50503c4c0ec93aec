"""Images and labels: loading, the in-memory source, and the transforms in front of the network."""

from __future__ import annotations

from der_fast.data.convert import load_folder_images
from der_fast.data.dataset import from_dataset
from der_fast.data.load import load_dataset
from der_fast.data.parts import as_image_batch, file_parts, image_parts
from der_fast.data.sizes import stored_side
from der_fast.data.source import Batch, ImageSource, MemorySource
from der_fast.data.transform import Transform, transforms_for

__all__ = [
    "Batch",
    "ImageSource",
    "MemorySource",
    "Transform",
    "as_image_batch",
    "file_parts",
    "from_dataset",
    "image_parts",
    "load_dataset",
    "load_folder_images",
    "stored_side",
    "transforms_for",
]
