"""A fixed held-out part for data sets without a test split."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from der_fast.data.io.names import spelled
from der_fast.errors import DataError


def held_out(class_name: str, names: Sequence[str], share: float) -> list[bool]:
    """Return for each image of a class whether it is held out for testing.

    The choice follows a hash of class and image name, so it depends on neither a random state nor an order, and adding images to a folder
    moves hardly any image from one side to the other. Names are compared as they read, however their bytes encode them.

    Args:
        class_name: name of the class.
        names: distinct names of its images.
        share: share to hold out, in (0, 1); at least one image is held out and at least one is left.

    Raises:
        DataError: fewer than two images, or a share outside (0, 1).
    """
    if not 0.0 < share < 1.0:
        raise DataError(f"data.test_share must lie between 0 and 1, not {share}")
    if len(names) < 2:
        raise DataError(
            f"class {class_name!r} has only {len(names)} image, so none can be held out for testing; add images, remove the class, "
            "or give the data set train/ and test/ folders"
        )
    count = min(max(1, round(share * len(names))), len(names) - 1)
    # Names need not be UTF-8: what is not goes back to the bytes that the system gave.
    spellings = (spelled(f"{class_name}\x1f{name}") for name in names)
    digests = [hashlib.sha256(text.encode(errors="surrogateescape")).digest() for text in spellings]
    ranked = sorted(range(len(names)), key=digests.__getitem__)
    chosen = set(ranked[:count])
    return [index in chosen for index in range(len(names))]
