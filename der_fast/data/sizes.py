"""The size at which images are held in memory, and how much memory they may take."""

from __future__ import annotations

from der_fast.errors import DataError

SMALL_SIDE, LARGE_SIDE = 32, 224


def default_side(largest: int) -> int:
    """Return the side in pixels for images whose longest side is `largest`: 32 if none is longer than that, else 224."""
    return SMALL_SIDE if largest <= SMALL_SIDE else LARGE_SIDE


def stored_side(side: int, random_resized_crop: bool) -> int:
    """Return the side in pixels at which images are held in memory for a network input of `side` pixels."""
    return round(side * 256 / 224) if random_resized_crop else side


def refuse_too_much(count: int, size: tuple[int, int], max_gib: float, what: str) -> None:
    """Refuse to hold too many images.

    Args:
        count: number of images.
        size: (height, width) in pixels.
        max_gib: the limit in GiB.
        what: what they are, for the message.

    Raises:
        DataError: they would need more than `max_gib` GiB as uint8 RGB.
    """
    gib = count * size[0] * size[1] * 3 / 2**30
    if gib > max_gib:
        raise DataError(
            f"{what}: {count} images of {size[0]} × {size[1]} pixels need {gib:.3g} GiB of memory, more than data.max_gib={max_gib:g}; "
            "raise data.max_gib, or lower data.image_size or data.train_per_class"
        )
