"""Files that are either the old version or the new one, never half of each."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from der_fast.errors import StorageError


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> Path:
    """Let `write` fill a temporary file beside `path`, then rename it to `path`.

    Args:
        path: where the file shall be; missing parent folders are made.
        write: called with the temporary path; must create that file.

    Raises:
        StorageError: no space left, no permission, or any other failure of the file system. What stood at `path` before is
            unharmed, and the temporary file is removed.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except Exception as error:
        temporary.unlink(missing_ok=True)
        reason = _storage_reason(error)
        if reason is None:
            raise
        raise StorageError(
            f"could not write {path}: {reason}. What was saved there before is unharmed; "
            "free some space or choose another folder, then go on with --resume."
        ) from error
    return path


def _storage_reason(error: Exception) -> str | None:
    """Name the file system's complaint, or None where the error is of another kind."""
    if isinstance(error, OSError):
        return os.strerror(error.errno) if error.errno else str(error)
    # safetensors reports the operating system's error as text inside its own exception class.
    text = str(error)
    if "os error" in text.lower() or os.strerror(errno.ENOSPC) in text:
        return text
    return None


def write_bytes(path: str | Path, data: bytes) -> Path:
    """Write `data` to `path` atomically; see `write_atomically`."""
    return write_atomically(path, lambda temporary: _store(temporary, data))


def _store(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def write_json(path: str | Path, value: Any) -> Path:
    """Write `value` as indented JSON to `path` atomically; NaN and infinity are refused (ValueError)."""
    return write_bytes(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def sha256_of(path: str | Path) -> str:
    """Return the SHA-256 of a file as hexadecimal text."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
