"""One tiny saved run on real images, and networks of every shape with random weights."""

from __future__ import annotations

import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, features
from torch import Tensor

from der_fast.api import train
from der_fast.compaction import pack, plan
from der_fast.compaction.bank import FrozenBank
from der_fast.compaction.bank.extractor import CompactExtractor
from der_fast.deployment.network import FoldedNetwork, extractor_of, network_of
from der_fast.model.architecture import Architecture
from der_fast.model.classifier import new_classifier
from der_fast.model.extractor import Extractor, MaskedBatchNorm
from der_fast.model.layout import MaskLayout
from der_fast.model.readout import linear_readout
from der_fast.training import latency
from der_fast.training.learner import Learner
from der_fast.training.model import Model, Network
from der_fast.training.prediction import Prediction

TINY: dict[str, Any] = {
    "model.backbone": "resnet20", "model.width": 2, "data.train_per_class": 8, "data.test_per_class": 2, "memory.total": 20,
    "masks.bn_images": 16, "masks.floor": 0.5, "runtime.threads": 1, "runtime.device": "cpu", "classifier.temperature": 3.0,
    **{f"{stage}.{key}": value for stage in ("first", "later", "classifier")
       for key, value in {"epochs": 1, "milestones": (), "warmup_epochs": 0, "batch_size": 16, "lr": 0.05}.items()},
}  # fmt: skip

Masked = Callable[[Tensor], Tensor]


@pytest.fixture(scope="session", autouse=True)
def _quick() -> Iterator[None]:
    """One thread and one call per timing."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "REPEATS", 1)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_settings() -> dict[str, Any]:
    return dict(TINY)


@pytest.fixture(scope="session")
def same() -> Callable[[list[Prediction], list[Prediction]], bool]:
    return same_predictions


def same_predictions(found: list[Prediction], wanted: list[Prediction]) -> bool:
    """Whether predictions agree but for rounding; classes of nearly the same probability may change places."""
    for mine, other in zip(found, wanted, strict=True):
        for name, probability in mine.top:
            assert probability == pytest.approx(dict(other.top)[name], abs=1e-5)
        assert mine.probability == pytest.approx(other.probability, abs=1e-5)
    return len(found) > 0


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of five handwritten digits."""
    out = tmp_path_factory.mktemp("deployment") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("der_fast.runs.write_report", lambda run: None)
        train("digits", "B0-2", out=out, settings=TINY)
    return out


@pytest.fixture
def learner(run_folder: Path) -> Learner:
    return Learner.load(run_folder, device="cpu")


@pytest.fixture(scope="session")
def digits() -> Tensor:
    """Real images, uint8, 70 × 8 × 8 × 3."""
    from der_fast.config.schema import DataConfig
    from der_fast.data import load_dataset

    return load_dataset(DataConfig(name="digits"))[1].images[:70]


@pytest.fixture(scope="session")
def every_kind(digits: Tensor, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Digits in every kind of file that the engine reads."""
    return write_every_kind(tmp_path_factory.mktemp("kinds"), [np.asarray(pixels) for pixels in digits])


@pytest.fixture(scope="session")
def random_network() -> Callable[..., tuple[FoldedNetwork, Masked]]:
    return build_network


def write_every_kind(folder: Path, pictures: list[np.ndarray]) -> list[Path]:
    """Write one file per kind, the next of the pictures (uint8, 8 × 8 × 3, grey in three channels) into each."""
    waiting = iter(pictures)

    def photo() -> Image.Image:
        # Larger and coloured, so that turning it or losing a channel shows.
        pixels = next(waiting).astype(float) * (1, 0.8, 0.6) + (0, 20, 60)
        return Image.fromarray(pixels.round().astype(np.uint8)).resize((40, 24), Image.Resampling.BICUBIC)

    def save(image: Image.Image, name: str, **options: Any) -> None:
        image.save(folder / name, **options)

    def wide(order: str) -> np.ndarray:
        return (np.asarray(photo().convert("L")).astype(order) * 257 + 3).astype(order)

    lying = Image.Exif()
    lying[0x0112] = 6
    slope = Image.linear_gradient("L").resize((40, 24))
    suffixes = ["jpg", "jpeg", "jpe", "jfif", "png", "bmp", "dib", "gif", "tif", "tiff", "ppm", "pgm", "pbm", "pnm", "tga"]
    for suffix in [
        *suffixes,
        *(name for name in ("webp", "avif") if features.check(name)),
        *(["jp2"] if features.check("jpg_2000") else []),
    ]:
        save(photo().convert("L" if suffix == "pgm" else "1" if suffix == "pbm" else "RGB"), f"plain.{suffix}")
    for suffix in ("jpg", "png", "tif", "webp"):
        save(photo(), f"lying.{suffix}", exif=lying)
    for suffix in ("png", "tif"):
        for mode in ("1", "L", "LA", "P", "RGBA"):
            image = photo().convert(mode)
            if image.mode in ("LA", "RGBA"):
                image.putalpha(slope)
            save(image, f"{mode}.{suffix}")
    save(Image.fromarray(wide("<u2")), "16.png")
    save(Image.fromarray(wide("<u2")), "16.tif")
    save(Image.fromarray(wide("<u2")), "16.pgm")
    save(Image.frombytes("I;16B", (40, 24), wide(">u2").tobytes()), "16 big-endian.tif")
    save(Image.fromarray(wide("<u2")), "16 lying.png", exif=lying)
    for name, kind, channels in (("16 grey and alpha", 4, 2), ("16 rgb", 2, 3), ("16 rgb and alpha", 6, 4)):
        (folder / f"{name}.png").write_bytes(sixteen_bit_png(np.stack([wide(">u2") for _ in range(channels)], 2), kind))
    palette = photo().quantize(16)
    save(palette, "one clear colour.png", transparency=palette.getpixel((20, 12)))
    save(palette, "half clear colours.png", transparency=bytes(range(0, 256, 16)))
    save(palette, "clear.gif", transparency=palette.getpixel((20, 12)))
    save(photo(), "two frames.gif", save_all=True, append_images=[photo()])
    key = photo()
    save(key, "clear rgb.png", transparency=key.getpixel((20, 12)))
    save(key.convert("L"), "clear grey.png", transparency=key.convert("L").getpixel((20, 12)))
    for name in ("clear.webp", "clear.tga"):
        image = photo()
        image.putalpha(slope)
        save(image, name)
    for name in ("cmyk.jpg", "cmyk.tif"):
        save(photo().convert("CMYK"), name)
    save(photo().convert("YCbCr"), "ycbcr.tif")
    # The same formats under their other names.
    for usual, others in (("jpg", ["mpo"]), ("png", ["apng"]), ("avif", ["avifs"]), ("jp2", ["j2k", "jpx", "j2c", "jpc", "jpf"])):
        for other in others if (folder / f"plain.{usual}").exists() else []:
            shutil.copy(folder / f"plain.{usual}", folder / f"other.{other}")
    (folder / "plain.qoi").write_bytes(qoi(np.asarray(photo())))
    save(photo().resize((1000, 600)), "large.jpg")
    return sorted(folder.iterdir())


def qoi(pixels: np.ndarray) -> bytes:
    """A QOI file of uint8 pixels H × W × 3, every pixel written out."""
    height, width, _ = pixels.shape
    header = b"qoif" + struct.pack(">IIBB", width, height, 3, 0)
    return header + b"".join(b"\xfe" + bytes(pixel) for pixel in pixels.reshape(-1, 3).tolist()) + bytes(7) + b"\x01"


def sixteen_bit_png(pixels: np.ndarray, kind: int) -> bytes:
    """A PNG of big-endian uint16 pixels H × W × C; Pillow writes only grey ones."""
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    parts = [struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def build_network(architecture: Architecture, keeps: list[Tensor], *, classes: int = 4, align: int = 1) -> tuple[FoldedNetwork, Masked]:
    """Return a network of one extractor per mask, and the function images → logits that its dense, masked extractors compute.

    Args:
        architecture: of all extractors.
        keeps: boolean (C,), the binary masks of each extractor.
        classes: number of classes.
        align: stored widths are multiples of it.
    """
    layout = MaskLayout(architecture)
    dense, compacts, plans = [], [], []
    for number, keep in enumerate(keeps):
        dense.append(_random_extractor(architecture, number))
        plans.append(plan(layout, keep))
        compacts.append(CompactExtractor(pack(dense[-1], plans[-1])))
    head = new_classifier(sum(extractor.features for extractor in compacts), classes, torch.Generator().manual_seed(9))
    model = Model(Network(architecture, FrozenBank(compacts), head), readout=linear_readout(head, 2.0))

    @torch.no_grad()
    def masked(images: Tensor) -> Tensor:
        rows = [images.new_zeros(len(images), 0).double()]
        for extractor, made in zip(dense, plans, strict=True):
            features = extractor.double()(images.double(), made.masks.double())
            rows.append(features[:, made.features])
        return (torch.cat(rows, 1) @ head.weight.double().T + head.bias.double()).float()

    if align == 1:
        return network_of(model), masked
    parts = tuple(extractor_of(pack(extractor, made, align=align)) for extractor, made in zip(dense, plans, strict=True))
    return replace(network_of(model), extractors=parts), masked


def _random_extractor(architecture: Architecture, seed: int) -> Extractor:
    noise = torch.Generator().manual_seed(seed)
    extractor = Extractor(architecture).initialise(noise).eval()
    with torch.no_grad():
        for module in extractor.modules():
            if isinstance(module, MaskedBatchNorm):
                for tensor, low, high in ((module.weight, 0.5, 1.5), (module.bias, -1, 1), (module.running_mean, -1, 1)):
                    tensor.copy_(torch.rand(tensor.shape, generator=noise) * (high - low) + low)
                module.running_var.copy_(torch.rand(module.running_var.shape, generator=noise) + 0.5)
    return extractor
