"""From an image file of any kind to uint8 RGB pixels of one size."""

from __future__ import annotations

import os
import warnings
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from der_fast.data.catalogue.kinds import open_image
from der_fast.data.io.members import openable
from der_fast.data.io.threads import TIMEOUT, Some, mapped, some

if TYPE_CHECKING:
    from torch import Tensor

_MOST_THREADS = 8
_FILES_PER_TASK = 64

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Decoded:
    """The result of decoding a list of files.

    Args:
        images: uint8, M × H × W × 3: the images that could be read.
        kept: the position of each in the list.
        lost: the positions of the files that could not be read.
        problems: "path: reason" for each of those.
    """

    images: Tensor
    kept: list[int]
    lost: list[int]
    problems: list[str]

    def part(self, start: int, stop: int) -> Decoded:
        """Return the result for ``files[start:stop]``, with positions counted from `start`."""
        first, last = bisect_left(self.kept, start), bisect_left(self.kept, stop)
        lost = slice(bisect_left(self.lost, start), bisect_left(self.lost, stop))
        return Decoded(
            self.images[first:last],
            [index - start for index in self.kept[first:last]],
            [index - start for index in self.lost[lost]],
            self.problems[lost],
        )


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB.

    Transparency (an alpha channel, or a transparent palette entry) is laid over white; 16-bit grey keeps its upper 8 bits; Pillow
    converts everything else (grey is repeated, CMYK and palettes are looked up).

    Raises:
        ValueError: 32-bit integer or floating pixels, whose range is unknown.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        grey = np.asarray(image).astype(np.uint32) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode!r} (32 bits) have no known range; save the image with 8 or 16 bits")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def fit(image: Image.Image, size: tuple[int, int]) -> Pixels:
    """Resize an RGB image so that it just covers `size` and cut off the rest evenly (bilinear, antialiased).

    Args:
        image: RGB.
        size: (height, width) in pixels.

    Returns:
        uint8, size[0] × size[1] × 3.
    """
    wanted = (size[1], size[0])
    if image.size != wanted:
        image = ImageOps.fit(image, wanted, method=Image.Resampling.BILINEAR)
    return np.asarray(image)


def decode(path: Path, size: tuple[int, int]) -> Pixels:
    """Read one image file: turned upright as its EXIF data says, RGB, of `size` (height, width).

    Large JPEGs are decoded at a reduced scale, never below twice the wanted size.

    Raises:
        Exception: whatever Pillow raises on a damaged or unknown file.
    """
    with open_image(openable(path), path.name) as image:
        side = 2 * max(size)
        image.draft(None, (side, side))
        ImageOps.exif_transpose(image, in_place=True)
        return fit(to_rgb(image), size)


def decode_files(
    paths: Sequence[Path], size: tuple[int, int], *, progress: Callable[[int], None] | None = None, timeout: float = TIMEOUT
) -> Decoded:
    """Decode many files in a few threads; a file that cannot be read is left out and reported.

    Args:
        paths: the files.
        size: (height, width) of the result in pixels.
        progress: called with the number of files done since the last call.
        timeout: seconds to wait for a few dozen files once those before them are done.

    Returns:
        The images in the order of `paths`, whichever thread was first.

    Raises:
        DataError: a drive did not answer in time.
    """
    # Decoding processes import this file, but not PyTorch, which takes seconds to load.
    import torch

    pixels = np.zeros((len(paths), *size, 3), dtype=np.uint8)
    reasons: list[str | None] = [None] * len(paths)

    def work(files: Some) -> None:
        for index in range(files.start, files.start + len(files.paths)):
            try:
                pixels[index] = decode(paths[index], size)
            except MemoryError:
                raise
            except Exception as error:  # damaged bytes make the decoders raise almost anything
                reasons[index] = reason_of(error)

    threads = min(_MOST_THREADS, os.cpu_count() or 1)
    # Even a few files are shared among all threads.
    groups = some([str(path) for path in paths], max(1, min(_FILES_PER_TASK, len(paths) // (2 * threads))))
    done = iter(groups)

    def advance(_: int) -> None:
        if progress is not None:
            progress(len(next(done).paths))

    with warnings.catch_warnings():
        # Pillow warns about odd EXIF blocks and palettes that it copes with.
        warnings.simplefilter("ignore")
        mapped(work, groups, timeout, count=threads, name="der_fast-decode", advance=advance)
    kept = [index for index, reason in enumerate(reasons) if reason is None]
    images = torch.from_numpy(pixels)
    if len(kept) < len(paths):
        images = images[torch.tensor(kept, dtype=torch.int64)]
    lost = [index for index, reason in enumerate(reasons) if reason is not None]
    return Decoded(images, kept, lost, [f"{paths[index]}: {reasons[index]}" for index in lost])


def reason_of(error: Exception) -> str:
    """Return in one line why an image could not be read."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a known format"
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return " ".join(str(error).split()) or type(error).__name__
