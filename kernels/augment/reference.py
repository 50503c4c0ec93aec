"""Augmentation of a batch of uint8 images in plain PyTorch: the definition of correct.

    p[n, h, w, c]   = images[n, h − P, w − P, c] inside the image, else 0          zero padding P in pixel space (black)
    q[n, h, w, c]   = p[n, h + row_n, w' + col_n, c],  w' = W − 1 − w if flip_n else w
    out[n, c, h, w] = (min(brightness_n · q / 255, 1) − mean_c) / std_c

The order is torchvision's RandomCrop(padding=P), RandomHorizontalFlip, ColorJitter(brightness), ToTensor, Normalize: the border is
black *before* normalisation. Unlike in PIL, the brightened pixel is not rounded back to 8 bits.

Layout: images N × H × W × 3, result N × 3 × H × W whose memory is N × H × W × 3 (channels-last). Arithmetic in float32, or in float64 if
the result is float64. Nothing is saved, since there is no backward pass. Bytes moved for Y = N·H·W·3: about 6Y for the passes over
uint8 (pad, crop, flip) and 20Y for those over float32 (convert, scale, clip, multiply-add).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from der_fast.kernels.dtypes import accumulator


def augment_reference(
    images: Tensor,
    *,
    row: Tensor,
    col: Tensor,
    flip: Tensor,
    brightness: Tensor,
    padding: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
) -> Tensor:
    """Compute the formula above; arguments as in `der_fast.kernels.augment.augment`, unchecked."""
    count, height, width, _ = images.shape
    work = accumulator(dtype)
    pixels = _mirror(_crop(images, row, col, padding) if padding else images.contiguous(), flip)

    # (min(b·q/255, 1) − mean)/std = min(b·q, 255)·scale + shift: one clamp and one multiply-add per value.
    scale, shift = scale_and_shift(mean, std)
    # Rows of W·3 values: broadcasting three channels over the innermost dimension would process three values at a time.
    scale_row, shift_row = (torch.tensor(part, dtype=torch.float64).to(images.device, work).repeat(width) for part in (scale, shift))
    values = pixels.view(count, height * width * 3).to(work)
    values = values.mul_(brightness.to(work)[:, None]).clamp_(max=255.0).view(count * height, width * 3)
    result = torch.addcmul(shift_row, values, scale_row, out=values).to(dtype).view(count, height, width, 3).permute(0, 3, 1, 2)
    return result if channels_last else result.contiguous()


def scale_and_shift(mean: Sequence[float], std: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return 1 / (255·std) and −mean / std of every channel."""
    return [1.0 / (255.0 * deviation) for deviation in std], [-centre / deviation for centre, deviation in zip(mean, std, strict=True)]


def _crop(images: Tensor, row: Tensor, col: Tensor, padding: int) -> Tensor:
    """Cut H × W windows out of the zero-padded images; returns N × H × W × 3, contiguous."""
    count, height, width, _ = images.shape
    padded_height, padded_width = height + 2 * padding, width + 2 * padding
    padded = images.new_zeros(count, padded_height, padded_width, 3)
    padded[:, padding : padding + height, padding : padding + width] = images
    # Row k of this overlapping view is the run of `width` pixels that starts at pixel k, so a crop is a gather of whole rows.
    runs = padded.as_strided((max(count * padded_height * padded_width - width + 1, 0), width * 3), (3, 1))
    first_row = torch.arange(count, device=images.device) * padded_height + row
    rows = first_row[:, None] + torch.arange(height, device=images.device)
    starts = rows * padded_width + col[:, None]
    return runs.index_select(0, starts.flatten()).view(count, height, width, 3)


def _mirror(pixels: Tensor, flip: Tensor) -> Tensor:
    """Mirror the chosen images of N × H × W × 3."""
    chosen = flip.nonzero().flatten()
    # Picking whole images out of (originals, mirrored) is several times faster than writing some of them back in place.
    both = torch.cat([pixels, pixels.index_select(0, chosen).flip(2)])
    position = torch.arange(len(flip), device=flip.device)
    position[chosen] = torch.arange(len(chosen), device=flip.device) + len(flip)
    return both.index_select(0, position)
