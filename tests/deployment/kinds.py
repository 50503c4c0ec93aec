"""Pictures in every kind of image file that the engine reads."""

from __future__ import annotations

import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, features


class Kinds:
    """Writes one file per kind into a folder, the next of the pictures (uint8, 8 × 8 × 3, grey in three channels) into each."""

    def __init__(self, folder: Path, pictures: list[np.ndarray]) -> None:
        self.folder, self.waiting = folder, iter(pictures)
        self.lying = Image.Exif()
        self.lying[0x0112] = 6
        self.slope = Image.linear_gradient("L").resize((40, 24))

    def photo(self) -> Image.Image:
        # Larger and coloured, so that turning it or losing a channel shows.
        pixels = next(self.waiting).astype(float) * (1, 0.8, 0.6) + (0, 20, 60)
        return Image.fromarray(pixels.round().astype(np.uint8)).resize((40, 24), Image.Resampling.BICUBIC)

    def wide(self, order: str) -> np.ndarray:
        return (np.asarray(self.photo().convert("L")).astype(order) * 257 + 3).astype(order)

    def save(self, image: Image.Image, name: str, **options: Any) -> None:
        image.save(self.folder / name, **options)

    def formats(self) -> None:
        suffixes = ["jpg", "jpeg", "jpe", "jfif", "png", "bmp", "dib", "gif", "tif", "tiff", "ppm", "pgm", "pbm", "pnm", "tga"]
        for suffix in [
            *suffixes,
            *(name for name in ("webp", "avif") if features.check(name)),
            *(["jp2"] if features.check("jpg_2000") else []),
        ]:
            self.save(self.photo().convert("L" if suffix == "pgm" else "1" if suffix == "pbm" else "RGB"), f"plain.{suffix}")
        (self.folder / "plain.qoi").write_bytes(qoi(np.asarray(self.photo())))
        self.save(self.photo().resize((1000, 600)), "large.jpg")

    def other_names(self) -> None:
        """The same formats under their other names."""
        for usual, others in (("jpg", ["mpo"]), ("png", ["apng"]), ("avif", ["avifs"]), ("jp2", ["j2k", "jpx", "j2c", "jpc", "jpf"])):
            for other in others if (self.folder / f"plain.{usual}").exists() else []:
                shutil.copy(self.folder / f"plain.{usual}", self.folder / f"other.{other}")

    def modes(self) -> None:
        for suffix in ("jpg", "png", "tif", "webp"):
            self.save(self.photo(), f"lying.{suffix}", exif=self.lying)
        for suffix in ("png", "tif"):
            for mode in ("1", "L", "LA", "P", "RGBA"):
                image = self.photo().convert(mode)
                if image.mode in ("LA", "RGBA"):
                    image.putalpha(self.slope)
                self.save(image, f"{mode}.{suffix}")
        for name in ("cmyk.jpg", "cmyk.tif"):
            self.save(self.photo().convert("CMYK"), name)
        self.save(self.photo().convert("YCbCr"), "ycbcr.tif")
        self.save(self.photo(), "two frames.gif", save_all=True, append_images=[self.photo()])

    def sixteen_bits(self) -> None:
        self.save(Image.fromarray(self.wide("<u2")), "16.png")
        self.save(Image.fromarray(self.wide("<u2")), "16.tif")
        self.save(Image.fromarray(self.wide("<u2")), "16.pgm")
        self.save(Image.frombytes("I;16B", (40, 24), self.wide(">u2").tobytes()), "16 big-endian.tif")
        self.save(Image.fromarray(self.wide("<u2")), "16 lying.png", exif=self.lying)
        for name, kind, channels in (("16 grey and alpha", 4, 2), ("16 rgb", 2, 3), ("16 rgb and alpha", 6, 4)):
            pixels = np.stack([self.wide(">u2") for _ in range(channels)], 2)
            (self.folder / f"{name}.png").write_bytes(sixteen_bit_png(pixels, kind))

    def clear_colours(self) -> None:
        palette = self.photo().quantize(16)
        self.save(palette, "one clear colour.png", transparency=palette.getpixel((20, 12)))
        self.save(palette, "half clear colours.png", transparency=bytes(range(0, 256, 16)))
        self.save(palette, "clear.gif", transparency=palette.getpixel((20, 12)))
        key = self.photo()
        self.save(key, "clear rgb.png", transparency=key.getpixel((20, 12)))
        self.save(key.convert("L"), "clear grey.png", transparency=key.convert("L").getpixel((20, 12)))
        for name in ("clear.webp", "clear.tga"):
            image = self.photo()
            image.putalpha(self.slope)
            self.save(image, name)


def write_every_kind(folder: Path, pictures: list[np.ndarray]) -> list[Path]:
    kinds = Kinds(folder, pictures)
    for write in (kinds.formats, kinds.other_names, kinds.modes, kinds.sixteen_bits, kinds.clear_colours):
        write()
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
