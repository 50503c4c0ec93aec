"""Small images on disk for the tests of the data layer."""

from __future__ import annotations

import threading
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
def dead(monkeypatch):
    """Return a function that lets a function of a module wait until the test ends, as a drive that does not answer does."""
    over = threading.Event()

    def let_wait(module, name):
        def wait(*arguments, **keywords):
            over.wait(60)
            raise OSError("the drive never answered")

        monkeypatch.setattr(module, name, wait)

    yield let_wait
    over.set()


@pytest.fixture
def photo():
    """Return a function that makes a random RGB image."""
    return noise


def smooth(height: int, width: int, seed: int) -> Image.Image:
    """A picture without edges, which any decoder and any resizing filter gives back nearly alike."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    waves = [np.sin(generator.uniform(1, 4) * rows + generator.uniform(1, 4) * columns + generator.uniform(0, 6)) for _ in range(3)]
    return Image.fromarray(np.uint8(127 + 120 * np.stack(waves, 2)))


@pytest.fixture
def photos(tmp_path):
    """A split of three classes with seven and three JPEGs of many sizes."""
    folder = tmp_path / "photos"
    for part, count in (("train", 7), ("val", 3)):
        for number, name in enumerate(("ape", "bee", "cow")):
            (folder / part / name).mkdir(parents=True)
            for index in range(count):
                seed = 100 * number + index + 10 * (part == "val")
                smooth(40 + 7 * index, 90 - 5 * index, seed).save(folder / part / name / f"{index}.jpg", quality=95)
    return folder


@pytest.fixture(params=["dali", "pillow"])
def reader(request):
    """The name of a reader, which is there."""
    if request.param == "dali":
        pytest.importorskip("nvidia.dali", reason="needs nvidia-dali (the extra 'dali'), which has no package for this system or Python")
    return request.param


@pytest.fixture
def open_photos():
    """Return a function that gives (train, test) of a folder read from its files at 48 pixels, and their transforms."""
    from der_fast.config.schema import DataConfig
    from der_fast.data import load_dataset, transforms_for

    libraries = []

    def load(folder: Path, reader: str, **keys):
        keys = {"image_size": 48, "random_resized_crop": True, "brightness": 0.0, "workers": 0 if reader == "pillow" else 2, **keys}
        config = DataConfig(name=str(folder), reader=reader, **keys)
        train, test = load_dataset(config)
        libraries.append(train.library)
        return train, test, *transforms_for(config, train.image_size)

    yield load
    for library in libraries:
        library.close()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real photos that lies beside a checkout; skips where there is none."""
    folder = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the shared photos in ../shared/data beside the checkout; they are not part of the repository")
    return folder.resolve()
