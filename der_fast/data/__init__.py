"""Images and labels: loading, the in-memory source, and the transforms in front of the network."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from der_fast.data.convert import load_folder_images
    from der_fast.data.dataset import from_dataset
    from der_fast.data.load import load_dataset
    from der_fast.data.parts import as_image_batch, file_parts, image_parts
    from der_fast.data.sizes import stored_side
    from der_fast.data.source import Batch, ImageSource, MemorySource
    from der_fast.data.transform import Transform, transforms_for

_HOMES = {
    "Batch": "source",
    "ImageSource": "source",
    "MemorySource": "source",
    "Transform": "transform",
    "as_image_batch": "parts",
    "file_parts": "parts",
    "from_dataset": "dataset",
    "image_parts": "parts",
    "load_dataset": "load",
    "load_folder_images": "convert",
    "stored_side": "sizes",
    "transforms_for": "transform",
}

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


def __getattr__(name: str) -> Any:
    # A process that decodes imports this package without PyTorch, which takes a second or two to load.
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
