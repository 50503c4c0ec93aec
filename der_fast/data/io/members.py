"""Images inside tar files, addressed like files: the tar's path, the image's name in it, and where its bytes are.

    /data/train/shard-000012.tar/0007.jpg@1536+48210      48,210 bytes of shard-000012.tar, from its byte 1536 on

So whatever takes the path of a file also takes that of an image in a tar, and reading one does not need the tar's list of contents.
"""

from __future__ import annotations

import io
import os
import re
import stat
from pathlib import Path

_MEMBER = re.compile(r"(.*\.tar)/.*@(\d+)\+(\d+)", re.DOTALL)


def member_name(name: str, offset: int, size: int) -> str:
    """Return the name of an image of a tar in a table of files.

    Args:
        name: the image's name in the tar.
        offset, size: where its bytes are in the tar.
    """
    return f"{name}@{offset}+{size}"


def split_member(path: str) -> tuple[str, int, int] | None:
    """Return (tar, offset, size) of the path of an image in a tar; None for other paths."""
    found = _MEMBER.fullmatch(path)
    return None if found is None else (found[1], int(found[2]), int(found[3]))


def read_bytes(path: str) -> bytes:
    """Return the contents of a regular file, or of an image in a tar; never waits for a pipe or a device.

    Raises:
        OSError: it does not exist, is not a regular file, or is empty, or the tar ends before the image does.
    """
    member = split_member(path)
    place, offset, size = member or (path, 0, -1)
    handle = os.open(place, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        mode = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode):
            raise OSError("a folder, not an image file" if stat.S_ISDIR(mode) else "not a regular file")
        with os.fdopen(handle, "rb", closefd=False) as file:
            file.seek(offset)
            data = file.read(size)
    finally:
        os.close(handle)
    if member is not None and len(data) < size:
        raise OSError("the tar ends before the image does")
    if not data:
        raise OSError("the file is empty")
    return data


def openable(path: Path) -> Path | io.BytesIO:
    """Return what Pillow can open without waiting: a regular file's path, or the bytes of an image in a tar; raises OSError."""
    if split_member(str(path)) is not None:
        return io.BytesIO(read_bytes(str(path)))
    # Opening a pipe or a device would wait forever.
    if not path.is_file():
        raise OSError("a folder, not an image file" if path.is_dir() else "no such file" if not path.exists() else "not a regular file")
    return path


def is_same_size(path: Path, size: int) -> bool:
    """Whether a file exists and has the size it had, or a tar exists and is long enough for the image in it."""
    member = split_member(str(path))
    try:
        if member is not None:
            return Path(member[0]).stat().st_size >= member[1] + member[2] and member[2] == size
        return path.stat().st_size == size
    except OSError:
        return False
