"""What happens to stored uint8 images on their way into the network, a batch at a time.

Small images (the authors' CIFAR transform): random crop out of zero padding, flip, brightness, normalise; nothing runs per image.
Photos: random-resized-crop and flip in training, centre crop in evaluation. Photos are stored 256/224 times larger than the network's
input, short side resized and the rest cut off, so a training crop never sees what lies outside that central square.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from der_fast.config.schema import DataConfig
from der_fast.data.sizes import stored_side
from der_fast.errors import DataError
from der_fast.kernels.augment import Draw, augment, draw_augmentation

_AREA = (0.08, 1.0)
_ASPECT = (3 / 4, 4 / 3)
_ATTEMPTS = 10


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
    """

    size: tuple[int, int]
    crop_padding: int
    flip: bool
    brightness: float
    random_resized_crop: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    train: bool

    @property
    def stored_size(self) -> tuple[int, int]:
        """The (height, width) that images should have before this transform."""
        return (stored_side(self.size[0], self.random_resized_crop), stored_side(self.size[1], self.random_resized_crop))

    def __call__(
        self,
        images: Tensor,
        generator: torch.Generator | None = None,
        *,
        draw: Draw | None = None,
        device: str | torch.device = "cpu",
        channels_last: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Transform a batch.

        Args:
            images: uint8, N × H × W × 3, on the CPU; H × W as `size`, or with `random_resized_crop` as `stored_size`.
            generator: CPU generator; required for training, unused otherwise.
            draw: these images' part of what `draw` returned for the epoch; default: drawn for the batch alone.
            device: where the result should be; pixels travel as uint8.
            channels_last: memory layout of the result.
            dtype: of the result.

        Returns:
            N × 3 × size[0] × size[1], normalised.

        Raises:
            DataError: the images are not of the size that this transform takes.
            ValueError: training without a generator.
        """
        self._check_size(images)
        draw = draw or self.draw(len(images), generator)
        if not self.train:
            images = _centre_crop(images, self.size)
        elif self.random_resized_crop:
            images = random_resized_crop(images, self.size, _required(generator))
        return augment(
            images.to(device, non_blocking=True),
            row=draw.row.to(device),
            col=draw.col.to(device),
            flip=draw.flip.to(device),
            brightness=draw.brightness.to(device),
            padding=self._padding,
            mean=self.mean,
            std=self.std,
            dtype=dtype,
            channels_last=channels_last,
        )

    def draw(self, count: int, generator: torch.Generator | None = None) -> Draw:
        """Draw crop, flip and brightness of `count` images, at once because that is cheap for a whole epoch.

        One number of the generator is the key of a counter-based draw (kernels/augment/draw.py), in which every image has its own
        number: what happens to it does not depend on how the epoch is cut into batches. In evaluation nothing is drawn.

        Raises:
            ValueError: training without a generator.
        """
        if not self.train:
            zero = torch.zeros(count, dtype=torch.int64)
            return Draw(zero, zero, torch.zeros(count, dtype=torch.bool), torch.ones(count))
        seed = int(torch.randint(2**63 - 1, (), generator=_required(generator)))
        return draw_augmentation(seed, 0, torch.arange(count), padding=self._padding, jitter=self.brightness, flip=self.flip)

    def draw_for_nothing(self, count: int, stored: tuple[int, int], generator: torch.Generator | None = None) -> None:
        """Take from the generator what transforming a batch takes beside `draw`, so that the batches behind it are what they would be.

        Args:
            count: images of the batch.
            stored: (height, width) of the images in pixels.
            generator: as the batch would have been given.
        """
        if self.train and self.random_resized_crop:
            _draw_rectangles(count, *stored, _required(generator))

    @property
    def _padding(self) -> int:
        """Of the random crop, which photos do not have."""
        return self.crop_padding if self.train and not self.random_resized_crop else 0

    def _check_size(self, images: Tensor) -> None:
        height, width = int(images.shape[1]), int(images.shape[2])
        fits = height >= self.size[0] and width >= self.size[1] if self.random_resized_crop else (height, width) == self.size
        if not fits:
            raise DataError(
                f"images are {height} × {width} pixels but the network takes {self.size[0]} × {self.size[1]}, stored as "
                f"{self.stored_size[0]} × {self.stored_size[1]}; load them with image_size={self.size[0]}"
            )


def _required(generator: torch.Generator | None) -> torch.Generator:
    if generator is None:
        raise ValueError("a training transform needs a torch.Generator: without one its result could not be repeated")
    return generator


def random_resized_crop(images: Tensor, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Cut a random rectangle out of every image and resize it (area 8–100 %, aspect ratio 3/4–4/3, log-uniform).

    One call per image, because every crop has its own shape and an antialiased resize (which a batched grid_sample cannot do) is what
    keeps shrunk crops free of aliasing; on uint8 channels-last images PyTorch has a vectorised path for it.

    Args:
        images: uint8, N × H × W × 3, on the CPU.
        size: (height, width) of the result.
        generator: CPU generator.

    Returns:
        uint8, N × size[0] × size[1] × 3.
    """
    count, height, width, _ = images.shape
    result = torch.empty(count, *size, 3, dtype=torch.uint8)
    for index, (top, left, rows, columns) in enumerate(_draw_rectangles(count, height, width, generator)):
        crop = images[index, top : top + rows, left : left + columns].permute(2, 0, 1)[None]
        resized = F.interpolate(crop, size=size, mode="bilinear", antialias=True, align_corners=False)
        result[index] = resized[0].permute(1, 2, 0)
    return result


def _draw_rectangles(count: int, height: int, width: int, generator: torch.Generator) -> list[tuple[int, int, int, int]]:
    """Draw (top, left, height, width) per image; where ten attempts do not fit, the central largest rectangle of allowed aspect."""
    area = torch.empty(count, _ATTEMPTS).uniform_(*_AREA, generator=generator).double() * (height * width)
    log_low, log_high = math.log(_ASPECT[0]), math.log(_ASPECT[1])
    aspect = torch.empty(count, _ATTEMPTS).uniform_(log_low, log_high, generator=generator).double().exp()
    position = torch.rand(count, 2, generator=generator).tolist()
    columns, rows = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
    fits = (columns > 0) & (columns <= width) & (rows > 0) & (rows <= height)
    first = fits.int().argmax(1, keepdim=True)
    chosen = torch.cat([rows.gather(1, first), columns.gather(1, first)], 1).tolist()
    rectangles = []
    for (crop_rows, crop_columns), (y, x), fitted in zip(chosen, position, fits.any(1).tolist(), strict=True):
        if fitted:
            top, left = int(y * (height - crop_rows + 1)), int(x * (width - crop_columns + 1))
        else:
            crop_columns = min(width, round(height * _ASPECT[1])) if width > height else width
            crop_rows = min(height, round(width / _ASPECT[0])) if height >= width else height
            top, left = (height - crop_rows) // 2, (width - crop_columns) // 2
        rectangles.append((top, left, crop_rows, crop_columns))
    return rectangles


def _centre_crop(images: Tensor, size: tuple[int, int]) -> Tensor:
    top, left = (images.shape[1] - size[0]) // 2, (images.shape[2] - size[1]) // 2
    return images[:, top : top + size[0], left : left + size[1]]


def transforms_for(config: DataConfig, image_size: tuple[int, int]) -> tuple[Transform, Transform]:
    """Return the (training, evaluation) transforms for images stored at `image_size`.

    Args:
        config: the data configuration.
        image_size: (height, width) of the stored images in pixels, as `ImageSource.image_size` says.

    Raises:
        DataError: the stored images are not of the size that `config` asks for.
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
