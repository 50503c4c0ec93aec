"""What happens to stored uint8 images on their way into the network, a batch at a time.

Small images (the authors' CIFAR transform): random crop with zero padding, flip, brightness, normalise; nothing runs per image.
Photos: random-resized-crop and flip in training, centre crop in evaluation. Photos are stored 256/224 times larger than the network's
input, short side resized and the rest cut off, so a training crop never sees anything outside that central square.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from der_fast.config.schema import DataConfig
from der_fast.data.augment.draws import brightness, flips, key_of, random_windows, uniform
from der_fast.data.sizes import stored_side
from der_fast.errors import DataError
from der_fast.kernels.augment import Draw, augment, augment_drawn, draw_augmentation


class Drawn(NamedTuple):
    """What training does to N images.

    Attributes:
        crop: padded crop, flip and brightness.
        windows: int64 (N, 4): top, left, height, width of each photo's random window in pixels; None for small images.
    """

    crop: Draw
    windows: Tensor | None = None

    def at(self, start: int, stop: int) -> Drawn:
        """Return the draws for the images at positions start … stop − 1."""
        return Drawn(Draw(*(values[start:stop] for values in self.crop)), None if self.windows is None else self.windows[start:stop])


@dataclass(frozen=True)
class Transform:
    """Turns stored images into the network's input.

    Args:
        size: (height, width) of the network's input in pixels.
        crop_padding: zero padding in pixels for the random crop (training, small images); 0 = no random crop.
        flip: mirror half of the images (training).
        brightness: b; pixels are multiplied by a factor drawn from [max(0, 1 − b), 1 + b] and clipped to [0, 1] (training).
        random_resized_crop: the photo path: random-resized-crop in training, centre crop in evaluation.
        mean: channel means in [0, 1].
        std: channel standard deviations in [0, 1].
        train: draw random numbers; False gives the same result every time.
        view: the key of the draws, 0 … 2⁶³ − 1, for a fixed view of every image; None: each pass draws its own from its generator.
    """

    size: tuple[int, int]
    crop_padding: int
    flip: bool
    brightness: float
    random_resized_crop: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    train: bool
    view: int | None = None

    @property
    def draws(self) -> bool:
        """Whether every pass draws its own random numbers."""
        return self.train and self.view is None

    def key_of(self, generator: torch.Generator | None) -> int | None:
        """Return the key of a pass's draws: the view's, or one drawn from the generator; None if nothing is drawn."""
        if not self.train or self.view is not None:
            return self.view if self.train else None
        return None if generator is None else key_of(generator)

    @property
    def stored_size(self) -> tuple[int, int]:
        """The (height, width) that images should have before this transform."""
        return (stored_side(self.size[0], self.random_resized_crop), stored_side(self.size[1], self.random_resized_crop))

    def __call__(
        self,
        images: Tensor,
        drawn: Drawn | None = None,
        *,
        device: str | torch.device = "cpu",
        channels_last: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Transform a batch.

        Args:
            images: uint8, N × H × W × 3, on the CPU; H × W is `size`, or `stored_size` with `random_resized_crop`.
            drawn: what `draw` returned for these images; required for training, unused otherwise.
            device: device of the result; pixels are transferred as uint8.
            channels_last: memory layout of the result.
            dtype: of the result.

        Returns:
            N × 3 × size[0] × size[1], normalised.

        Raises:
            DataError: the images do not have the size that this transform takes.
            ValueError: training without `drawn`.
        """
        self._check_size(images)
        if not self.train:
            images, drawn = _centre_crop(images, self.size), _nothing(len(images))
        elif drawn is None:
            raise ValueError("a training transform needs the result of draw(): without it the output could not be repeated")
        elif drawn.windows is not None:
            images = resized_windows(images, self.size, drawn.windows)
        return augment(
            images.to(device, non_blocking=True),
            row=drawn.crop.row.to(device),
            col=drawn.crop.col.to(device),
            flip=drawn.crop.flip.to(device),
            brightness=drawn.crop.brightness.to(device),
            padding=self._padding,
            mean=self.mean,
            std=self.std,
            dtype=dtype,
            channels_last=channels_last,
        )

    def drawn_on_device(
        self, images: Tensor, positions: Tensor, key: Tensor, *, dtype: torch.dtype, channels_last: bool, backend: str
    ) -> Tensor:
        """Return what the transform makes of resident small images, with the draws that `draw` would return for the same key.

        Args:
            images: uint8, D × H × W × 3, contiguous, on a device.
            positions: int64 (N,), on the same device.
            key: int64 (2,), on the same device: the epoch's key, and 0.
            dtype, channels_last: of the result, N × 3 × H × W.
            backend: 'fused' or 'reference', see `augment_drawn`.
        """
        return augment_drawn(
            images,
            key=key,
            numbers=positions,
            index=positions,
            padding=self._padding,
            jitter=self.brightness,
            flip=self.flip,
            mean=self.mean,
            std=self.std,
            dtype=dtype,
            channels_last=channels_last,
            backend=backend,
        )

    def draw(self, key: int, images: Tensor, stored: tuple[int, int]) -> Drawn:
        """Draw what training does to images: a function of only the epoch's key and each image's number.

        So it does not matter how an epoch is cut into batches, where it starts, or which process reads an image. Small images take their
        numbers from `kernels/augment/draw.py`, photos from `draws.py`, like photos in files.

        Args:
            key: the epoch's key, from `draws.key_of`.
            images: int64 (N,): the images' positions in their source.
            stored: (height, width) of the stored images in pixels.
        """
        if not self.random_resized_crop:
            return Drawn(draw_augmentation(key, 0, images, padding=self._padding, jitter=self.brightness, flip=self.flip))
        numbers = uniform(key, images.numpy())
        heights, widths = (np.full(len(images), side, dtype=np.int64) for side in stored)
        zero = torch.zeros(len(images), dtype=torch.int64)
        flip = torch.from_numpy(flips(numbers)) if self.flip else torch.zeros(len(images), dtype=torch.bool)
        bright = torch.from_numpy(brightness(numbers, self.brightness)).float()
        return Drawn(Draw(zero, zero, flip, bright), torch.from_numpy(random_windows(numbers, heights, widths)))

    @property
    def _padding(self) -> int:
        """Padding of the random crop in pixels; photos have none."""
        return self.crop_padding if self.train and not self.random_resized_crop else 0

    def _check_size(self, images: Tensor) -> None:
        height, width = int(images.shape[1]), int(images.shape[2])
        fits = height >= self.size[0] and width >= self.size[1] if self.random_resized_crop else (height, width) == self.size
        if not fits:
            raise DataError(
                f"images are {height} × {width} pixels but the network takes {self.size[0]} × {self.size[1]}, stored as "
                f"{self.stored_size[0]} × {self.stored_size[1]}; load them with image_size={self.size[0]}"
            )


def _nothing(count: int) -> Drawn:
    zero = torch.zeros(count, dtype=torch.int64)
    return Drawn(Draw(zero, zero, torch.zeros(count, dtype=torch.bool), torch.ones(count)))


def resized_windows(images: Tensor, size: tuple[int, int], windows: Tensor) -> Tensor:
    """Cut a window out of every image and resize it.

    One call per image, because every window has its own shape and an antialiased resize (which a batched grid_sample cannot do) is what
    keeps shrunk crops free of aliasing; on uint8 channels-last images PyTorch has a vectorised path for it.

    Args:
        images: uint8, N × H × W × 3, on the CPU.
        size: (height, width) of the result.
        windows: int64 (N, 4): top, left, height, width in pixels.

    Returns:
        uint8, N × size[0] × size[1] × 3.
    """
    result = torch.empty(len(images), *size, 3, dtype=torch.uint8)
    for index, (top, left, rows, columns) in enumerate(windows.tolist()):
        crop = images[index, top : top + rows, left : left + columns].permute(2, 0, 1)[None]
        resized = F.interpolate(crop, size=size, mode="bilinear", antialias=True, align_corners=False)
        result[index] = resized[0].permute(1, 2, 0)
    return result


def _centre_crop(images: Tensor, size: tuple[int, int]) -> Tensor:
    top, left = (images.shape[1] - size[0]) // 2, (images.shape[2] - size[1]) // 2
    return images[:, top : top + size[0], left : left + size[1]]


def transforms_for(config: DataConfig, image_size: tuple[int, int]) -> tuple[Transform, Transform]:
    """Return the (training, evaluation) transforms for images stored at `image_size`.

    Args:
        config: the data configuration.
        image_size: (height, width) of the stored images in pixels, see `ImageSource.image_size`.

    Raises:
        DataError: the stored images do not have the size that `config` needs.
    """
    if config.image_size is not None:
        size = (config.image_size, config.image_size)
    elif config.random_resized_crop:
        size = (round(image_size[0] * 224 / 256), round(image_size[1] * 224 / 256))
    else:
        size = image_size
    stored = (stored_side(size[0], config.random_resized_crop), stored_side(size[1], config.random_resized_crop))
    if stored != tuple(image_size):
        raise DataError(
            f"the images are stored at {image_size[0]} × {image_size[1]} pixels, but data.image_size={config.image_size} with "
            f"data.random_resized_crop={config.random_resized_crop} needs {stored[0]} × {stored[1]}; load them with the same configuration"
        )

    def build(train: bool) -> Transform:
        return Transform(
            size=size,
            crop_padding=0 if config.random_resized_crop else config.crop_padding,
            flip=config.flip,
            brightness=config.brightness,
            random_resized_crop=config.random_resized_crop,
            mean=config.mean,
            std=config.std,
            train=train,
        )

    return build(True), build(False)
