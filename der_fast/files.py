"""Files that are either the old version or the new one, never half of each."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from der_fast.errors import Spelling, StorageError

LOCK = ".lock"

_TEMPORARY = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.tmp")
# What this process holds: folder → the thread that holds it.
_held: dict[Path, int] = {}
_guard = threading.Lock()


def _hold_nothing() -> None:
    global _guard
    _held.clear()
    _guard = threading.Lock()


# A forked process does not hold what its parent holds, though its thread has the same number.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_hold_nothing)


def write_atomically(path: str | Path, write: Callable[[Path], None], *, remedy: str | None = None) -> Path:
    """Let `write` fill a temporary file next to `path`, then rename it to `path`.

    Args:
        path: where the file should be; missing parent folders are made.
        write: called with the temporary path; must create that file.
        remedy: what to do if it fails, for the message; default: what to do with a run that was stopped by it.

    Raises:
        StorageError: no space left, no permission, or any other failure of the file system. What was at `path` before is
            unharmed, and the temporary file is removed.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb+") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
    except BaseException as error:
        # If not even the parent is a folder, unlinking raises too, and would hide what went wrong.
        with contextlib.suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError):
            raise
        what = f"could not write {path}: {_reason(error)}. What was saved there before is unharmed"
        raise StorageError(f"{what}; ", *([remedy] if remedy else _remedy(error)), ".") from error
    _sync_folder(path.parent)
    return path


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)


def _remedy(error: OSError) -> Sequence[str | Spelling]:
    """Say what helps. A run cannot continue in another folder, so only a path that can never be written to calls for one."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "free some space"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        remedy = "make the folder writable"
    else:
        return ("choose another path",)
    again = Spelling("--resume (commands other than train: the same command)", "resume=True (calls other than train(): the same call)")
    return f"{remedy}, then continue with ", again


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut, if the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


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
    with Path(path).open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def remove_leftovers(folder: str | Path) -> None:
    """Delete the temporary files that a killed process left directly in `folder`; call this while holding the folder."""
    with contextlib.suppress(OSError):
        for path in Path(folder).iterdir():
            if _TEMPORARY.fullmatch(path.name):
                path.unlink(missing_ok=True)


@contextlib.contextmanager
def held(folder: str | Path) -> Iterator[None]:
    """Keep other processes and threads from writing to `folder` meanwhile; it is made if it does not exist.

    The thread that holds a folder may hold it again. The system releases it when the process ends, however it ends. Without
    such locks (Windows, some network drives) only the threads of one process exclude each other.

    Raises:
        StorageError: another process or thread holds it, or the folder cannot be written to.
    """
    folder, thread = Path(folder), threading.get_ident()
    key = folder.absolute()
    with _guard:
        holder = _held.get(key)
        if holder is None:
            _held[key] = thread
    if holder == thread:
        yield
        return
    if holder is not None:
        raise StorageError(f"another thread of this program is writing to {folder}: wait for it, or choose another folder")
    try:
        with _locked(folder):
            yield
    finally:
        _held.pop(key, None)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / LOCK).open("a")
    except OSError as error:
        raise StorageError(f"cannot write to {folder}: {_reason(error)}; choose another folder") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StorageError(f"another process is writing to {folder}: wait until it ends, or choose another folder") from error
        except OSError:
            # A drive without locks: writing unguarded is better than not writing at all.
            pass
        yield
