"""Images and labels: loading, the in-memory source, and the transforms in front of the network."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from der_fast.data.augment.transform import Transform, transforms_for
    from der_fast.data.decode.convert import load_folder_images
    from der_fast.data.decode.parts import as_image_batch, file_parts, image_parts
    from der_fast.data.load import load_dataset
    from der_fast.data.memory_source import MemorySource
    from der_fast.data.sets.dataset import from_dataset
    from der_fast.data.sizes import stored_side
    from der_fast.data.source import Batch, ImageSource

_HOMES = {
    "Batch": "source",
    "ImageSource": "source",
    "MemorySource": "memory_source",
    "Transform": "augment.transform",
    "as_image_batch": "decode.parts",
    "file_parts": "decode.parts",
    "from_dataset": "sets.dataset",
    "image_parts": "decode.parts",
    "load_dataset": "load",
    "load_folder_images": "decode.convert",
    "stored_side": "sizes",
    "transforms_for": "augment.transform",
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
    # Decoding processes import this package without PyTorch, which takes a second or two to load.
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
