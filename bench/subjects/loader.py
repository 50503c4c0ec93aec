"""The input pipeline of public code: PIL, one image at a time, in the worker processes of a DataLoader."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
PADDING, BRIGHTNESS = 4, 63 / 255


class PillowImages(Dataset[tuple[Tensor, int]]):
    """Random crop of a padded image, flip, brightness, to tensor, normalise: what torchvision's transforms do, in their order."""

    def __init__(self, pixels: Tensor, labels: Tensor) -> None:
        self.pixels, self.labels = pixels.numpy(), labels.tolist()
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = Image.fromarray(self.pixels[index])
        width, height = image.size
        padded = Image.new("RGB", (width + 2 * PADDING, height + 2 * PADDING))
        padded.paste(image, (PADDING, PADDING))
        row, column, flip = (int(torch.randint(bound, ())) for bound in (2 * PADDING + 1, 2 * PADDING + 1, 2))
        image = padded.crop((column, row, column + width, row + height))
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        image = ImageEnhance.Brightness(image).enhance(float(torch.empty(()).uniform_(1 - BRIGHTNESS, 1 + BRIGHTNESS)))
        values = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float().div(255)
        return (values - self.mean) / self.std, self.labels[index]


def batches(
    pixels: Tensor, labels: Tensor, batch: int, device: torch.device, workers: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield shuffled batches on `device`; by default one worker per core, at most 16."""
    count = min(16, os.cpu_count() or 1) if workers is None else workers
    loader = DataLoader(
        PillowImages(pixels, labels),
        batch,
        shuffle=True,
        num_workers=count,
        pin_memory=device.type == "cuda",
        persistent_workers=False,
    )
    for images, targets in loader:
        yield images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
