"""The last steps on the CPU, image by image in threads: resize a window, cut, mirror, jitter, normalise."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

import torch
import torch.nn.functional as F
from torch import Tensor

from der_fast.data.augment.draws import Floats, Ints
from der_fast.data.io.threads import FileThreads
from der_fast.data.read.walk import Walk, brightened

# Images that one thread finishes at a time.
PART = 16


def finish(
    images: Sequence[Tensor], windows: Ints, numbers: Floats | None, walk: Walk, threads: FileThreads
) -> tuple[Tensor, list[Future[None]]]:
    """Start to make a batch from windows of decoded images.

    Args:
        images: each uint8, H × W × 3, on the CPU; sizes may differ.
        windows: (n, 4) top, left, height and width of every image's window, in its pixels.
        numbers: (n, 24) random numbers of the images, None in evaluation.
        walk: sizes, normalisation and dtype.
        threads: the threads to use.

    Returns:
        n × H × W × 3 of the walk's dtype, and the futures to wait for before reading it.
    """
    mirrored, factors, rows = walk.flips(numbers, len(images)), walk.factors(numbers, len(images)), _rows(walk)
    out = torch.empty(len(images), *walk.transform.size, 3, dtype=walk.dtype)

    def work(start: int) -> None:
        for index in range(start, min(start + PART, len(images))):
            pixels = cut(images[index], windows[index].tolist(), walk)
            finish_into(out[index], pixels, bool(mirrored[index]), float(factors[index]), rows)

    return out, [threads.submit(work, start) for start in range(0, len(images), PART)]


def cut(image: Tensor, window: list[int], walk: Walk) -> Tensor:
    """Resize a window of a decoded image and cut off what an evaluation's centre crop leaves out: uint8, H × W × 3."""
    top, left, height, width = window
    crop = image[top : top + height, left : left + width]
    if (height, width) != walk.resized:
        # With exactly these strides PyTorch takes it for channels-last, which has a fast path.
        planes = crop.contiguous()[None].permute(0, 3, 1, 2)
        # PyTorch's fast antialiased resize of uint8 exists on the CPU only.
        if image.device.type == "cpu":
            planes = F.interpolate(planes, size=walk.resized, mode="bilinear", antialias=True, align_corners=False)
        else:
            planes = F.interpolate(planes.float(), size=walk.resized, mode="bilinear", antialias=True, align_corners=False)
            planes = planes.round_().clamp_(0, 255).to(torch.uint8)
        crop = planes[0].permute(1, 2, 0)
    rows, columns = walk.transform.size
    top, left = (crop.shape[0] - rows) // 2, (crop.shape[1] - columns) // 2
    return crop[top : top + rows, left : left + columns]


def finish_into(out: Tensor, pixels: Tensor, mirrored: bool, factor: float, rows: tuple[Tensor, Tensor] | None) -> None:
    """Mirror, jitter and normalise one image while it is in the processor's cache.

    Args:
        out: H × W × 3; written to.
        pixels: uint8, H × W × 3.
        mirrored: whether to mirror.
        factor: brightness factor; 1 does nothing.
        rows: scale and shift of a row of W × 3 numbers, float32: three at a time would use a fraction of a vector register. None keeps
            whole grey levels.
    """
    if mirrored:
        pixels = pixels.flip(1)
    if rows is None:
        out.copy_(pixels if factor == 1.0 else brightened(pixels, factor))
        return
    scale, shift = rows
    values = pixels.reshape(len(pixels), len(scale)).float()
    if factor != 1.0:
        values.mul_(factor).clamp_(0, 255)
    flat = out.view(values.shape)
    if flat.dtype == torch.float32:
        torch.addcmul(shift, values, scale, out=flat)
    else:
        flat.copy_(torch.addcmul(shift, values, scale))


def _rows(walk: Walk) -> tuple[Tensor, Tensor] | None:
    if walk.dtype == torch.uint8:
        return None
    mean, std = torch.tensor(walk.transform.mean), torch.tensor(walk.transform.std)
    width = walk.transform.size[1]
    return (1 / (255 * std)).repeat(width), (-mean / std).repeat(width)
