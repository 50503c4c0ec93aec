"""Fetching a published file: whole and verified, or not at all."""

from __future__ import annotations

import hashlib
import http.client
import urllib.error
import urllib.request
from pathlib import Path

from der_fast.data.io.progress import progress_bar
from der_fast.errors import DataError
from der_fast.files import write_atomically

_TIMEOUT_S = 30.0
_BLOCK = 1 << 18


def download(url: str, path: Path, *, md5: str) -> None:
    """Download `url` to a temporary file next to `path`, verify its checksum, then rename it to `path`.

    Args:
        url: an http(s) address.
        path: where the file should be; missing folders are made.
        md5: the expected checksum (hexadecimal).

    Raises:
        DataError: the server cannot be reached, the connection breaks, or the checksum is wrong; nothing is left at `path`.
        StorageError: the file cannot be written.
    """
    remedy = "free some space, make the folder writable, or name another one with data.root"
    write_atomically(path, lambda temporary: _fetch(url, temporary, path, md5), remedy=remedy)


def _fetch(url: str, temporary: Path, path: Path, md5: str) -> None:
    digest = hashlib.md5(usedforsecurity=False)
    # Network errors must be distinguished from disk errors: both are OSError.
    try:
        response = urllib.request.urlopen(url, timeout=_TIMEOUT_S)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _failed(url, path, error) from error
    with response, temporary.open("wb") as handle:
        length = response.headers.get("Content-Length")
        with progress_bar(f"downloading {path.name}", int(length) if length else None, in_bytes=True) as advance:
            while block := _read(response, url, path):
                handle.write(block)
                digest.update(block)
                advance(len(block))
    if digest.hexdigest() != md5:
        raise DataError(
            f"the download from {url} is not the published file: its MD5 is {digest.hexdigest()}, expected {md5}; it was deleted. Try "
            f"again, or download it by other means to {path}"
        )


def _read(response: http.client.HTTPResponse, url: str, path: Path) -> bytes:
    try:
        return response.read(_BLOCK)
    except (OSError, http.client.HTTPException) as error:
        raise _failed(url, path, error) from error


def _failed(url: str, path: Path, error: Exception) -> DataError:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    return DataError(f"could not download {url}: {reason}. Check the network, or download it by other means to {path}")
