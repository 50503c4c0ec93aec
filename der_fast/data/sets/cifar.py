"""CIFAR-10 and CIFAR-100 from the official archives.

Only the archive itself is read, never a folder unpacked from it, because only the archive has a published checksum. Its members are
Python 2 pickles, which can run any code when loaded carelessly: so the checksum is verified first, and then an unpickler reads them that
builds nothing but plain values and NumPy arrays.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from der_fast.data.io.download import download
from der_fast.data.memory_source import MemorySource
from der_fast.errors import DataError, Spelling

_SIDE = 32


@dataclass(frozen=True)
class Archive:
    """An official archive.

    Args:
        file: its name.
        url: where it is published.
        md5: its published checksum.
        folder: the folder inside it.
        train: members with training images, inside `folder`.
        test: the member with test images.
        meta: the member with class names.
        names_key: key of the class names in `meta`.
        labels_key: key of the labels in the other members.
    """

    file: str
    url: str
    md5: str
    folder: str
    train: tuple[str, ...]
    test: str
    meta: str
    names_key: bytes
    labels_key: bytes


ARCHIVES: Mapping[str, Archive] = {
    "cifar10": Archive(
        file="cifar-10-python.tar.gz",
        url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        md5="c58f30108f718f92721af3d95e74349a",
        folder="cifar-10-batches-py",
        train=tuple(f"data_batch_{number}" for number in range(1, 6)),
        test="test_batch",
        meta="batches.meta",
        names_key=b"label_names",
        labels_key=b"labels",
    ),
    "cifar100": Archive(
        file="cifar-100-python.tar.gz",
        url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        md5="eb9058c3a382ffc7106e4002c42a8d85",
        folder="cifar-100-python",
        train=("train",),
        test="test",
        meta="meta",
        names_key=b"fine_label_names",
        labels_key=b"fine_labels",
    ),
}

DOWNLOAD = Spelling("--download", "data.download=True in settings")


def load_cifar(name: str, root: Path) -> tuple[MemorySource, MemorySource]:
    """Return (train, test) of ``"cifar10"`` or ``"cifar100"`` (fine labels): uint8, 32 × 32, in the archive's order.

    Args:
        name: a key of `ARCHIVES`.
        root: the folder that holds the archive; a missing one is downloaded from its official address.

    Raises:
        DataError: a failed download, a wrong checksum, or unexpected content.
        StorageError: the downloaded archive cannot be written.
    """
    archive = ARCHIVES[name]
    path = root / archive.file
    if not path.is_file():
        download(archive.url, path, md5=archive.md5)
    data = path.read_bytes()
    # Exactly the bytes that were checked are unpickled.
    found = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if found != archive.md5:
        raise DataError(
            f"{path} is damaged or not the official file: its MD5 is {found}, expected {archive.md5}; it was not read. "
            f"Delete it and download {archive.url} again (or use ",
            DOWNLOAD,
            ")",
        )
    try:
        members = _read_members(data, archive)
        names = [text.decode() for text in members[archive.meta][archive.names_key]]
        train = _source(archive, path, members, archive.train, names)
        return train, _source(archive, path, members, (archive.test,), names)
    except (tarfile.TarError, pickle.UnpicklingError, EOFError, OSError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path} has the right checksum but cannot be read: {error!r}; please report this") from error


def _read_members(data: bytes, archive: Archive) -> dict[str, Any]:
    """Unpickle the members that are needed, straight from memory."""
    members: dict[str, Any] = {}
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as tar:
        for member in (archive.meta, *archive.train, archive.test):
            handle = tar.extractfile(f"{archive.folder}/{member}")
            if handle is None:
                raise KeyError(member)
            members[member] = ArrayUnpickler(handle, encoding="bytes").load()
    return members


class ArrayUnpickler(pickle.Unpickler):
    """An unpickler that builds plain Python values and NumPy arrays, and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        """Return one of the three objects an array's pickle names.

        Raises:
            pickle.UnpicklingError: any other name.
        """
        # NumPy 2 moved the module; importing it by its old name would warn.
        if (module, name) in (("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")):
            return _RECONSTRUCT
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no data set needs")


# What NumPy itself would write into a pickle; the same function under NumPy 1 and 2.
_RECONSTRUCT: Any = np.zeros(1, dtype=np.uint8).__reduce__()[0]


def _source(archive: Archive, path: Path, members: dict[str, Any], parts: tuple[str, ...], names: list[str]) -> MemorySource:
    pixels: list[Tensor] = []
    labels: list[Tensor] = []
    files: list[str] = []
    for part in parts:
        rows, targets = members[part][b"data"], members[part][archive.labels_key]
        if rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != 3 * _SIDE * _SIDE or len(targets) != len(rows):
            raise DataError(
                f"{path}: {part} holds {rows.dtype} {rows.shape} and {len(targets)} labels, expected uint8 N × 3072 and N labels"
            )
        # Each row holds the red, then the green, then the blue plane.
        pixels.append(torch.from_numpy(rows.reshape(-1, 3, _SIDE, _SIDE)).permute(0, 2, 3, 1))
        labels.append(torch.tensor(targets, dtype=torch.int64))
        files.extend(f"{part}/{text.decode()}" for text in members[part].get(b"filenames", []))
    return MemorySource(torch.cat(pixels).contiguous(), torch.cat(labels), names, files=files or None)
