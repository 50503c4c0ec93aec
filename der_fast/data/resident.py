"""Small images that lie on a GPU as uint8: a batch is a vector of positions, and one kernel indexes, augments and normalises."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from der_fast.data.augment.transform import Transform
from der_fast.data.memory_source import MemorySource
from der_fast.data.source import ImageSource

# What training needs besides the images is larger by far.
_SHARE = 0.25


class ResidentImages:
    """A source's images on a device.

    Args:
        pixels: uint8, D × H × W × 3, contiguous, on the device.
        labels: int64 (D,), on the device.
        transform: the training transform, without random-resized-crop.
        dtype: of the batches.
        channels_last: memory layout of the batches.
        backend: 'fused' (one kernel) or 'reference'.
    """

    def __init__(
        self, pixels: Tensor, labels: Tensor, transform: Transform, dtype: torch.dtype, *, channels_last: bool, backend: str
    ) -> None:
        self.pixels, self.labels, self.transform, self.dtype = pixels, labels, transform, dtype
        self.channels_last, self.backend = channels_last, backend
        self.key = torch.zeros(2, dtype=torch.int64, device=pixels.device)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def begin(self, key: int | None) -> None:
        """Set the key of the draws of the batches that follow; a captured CUDA graph reads it too."""
        self.key.copy_(torch.tensor([key or 0, 0]))

    def batch(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return images (N, 3, H, W) and labels (N,) for positions (N,) int64 on the device; asks the device for nothing."""
        images = self.transform.drawn_on_device(
            self.pixels, positions, self.key, dtype=self.dtype, channels_last=self.channels_last, backend=self.backend
        )
        return images, self.labels.index_select(0, positions)


def on_device(
    source: ImageSource,
    transform: Transform,
    device: torch.device,
    dtype: torch.dtype,
    say: Callable[[str], None],
    *,
    channels_last: bool,
) -> ResidentImages | None:
    """Return a source's images on a GPU, or None if they are not in memory, are photos, or do not fit there.

    Args:
        source: the images.
        transform: the training transform.
        device: a GPU.
        dtype: of the batches.
        say: called with one line if they do not fit.
        channels_last: memory layout of the batches.
    """
    if not isinstance(source, MemorySource) or transform.random_resized_crop:
        return None
    size, free = source.images.numel(), free_bytes(device)
    try:
        if size > _SHARE * free:
            raise torch.OutOfMemoryError
        pixels = source.images.to(device)
    except torch.OutOfMemoryError:
        say(
            f"{len(source):,} images ({size / 2**30:.3g} GiB) go to the GPU batch by batch: only {free / 2**30:.3g} GiB of its memory is "
            f"free, and training needs most of that"
        )
        return None
    return ResidentImages(pixels, source.labels.to(device), transform, dtype, channels_last=channels_last, backend="fused")


def free_bytes(device: torch.device) -> int:
    """Return a GPU's free memory, what PyTorch holds without using it included."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused
