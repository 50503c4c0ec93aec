"""Small images on disk for the tests of the data layer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def noise(height: int, width: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def write_images():
    """Return a function that fills a class folder with PNGs of a colour that tells the class, 'c00.png' and so on."""

    def write(folder: Path, count: int, value: int = 100, size: tuple[int, int] = (8, 8), suffix: str = "png") -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(count):
            Image.new("RGB", (size[1], size[0]), (value, index, 0)).save(folder / f"c{index:02d}.{suffix}")
        return folder

    return write


@pytest.fixture
def photo():
    """Return a function that makes a random RGB image."""
    return noise


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real photos that lies beside a checkout; skips where there is none."""
    folder = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the shared photos in ../shared/data beside the checkout; they are not part of the repository")
    return folder.resolve()
