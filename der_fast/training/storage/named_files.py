"""Tensors and facts on disk: safetensors with a checked JSON manifest, written so that a crash never harms what was there.

A record is two files, ``NAME.safetensors`` and ``NAME.json``. The manifest is written last and holds the checksum of the tensors and
one of itself, so a record either verifies as a whole or is not there.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from der_fast.errors import CheckpointError
from der_fast.files import sha256_of, write_bytes, write_json


def _serialised(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> tuple[bytes, str]:
    """Return a safetensors file's bytes and their SHA-256.

    The checksum is of what should be on disk, not of what is: reading detects a disk that lost part of it.
    """
    data = save({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, metadata)
    return data, hashlib.sha256(data).hexdigest()


def _write_unless_there(path: Path, data: bytes, checksum: str) -> None:
    if not (path.is_file() and sha256_of(path) == checksum):
        write_bytes(path, data)


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> str:
    """Write tensors to `path` atomically and return the file's SHA-256; a file that already holds them is not written again.

    Raises:
        StorageError: no space left or no permission.
    """
    data, checksum = _serialised(tensors, metadata)
    _write_unless_there(path, data, checksum)
    return checksum


def save_named_tensors(folder: Path, stem: str, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Write tensors to ``folder/stem-<checksum>.safetensors``; return the file's name and SHA-256 as ``{"file", "sha256"}``.

    Other tensors get another name, so nothing in the folder is overwritten. Raises StorageError.
    """
    return save_named_bytes(folder, stem, _serialised(tensors)[0])


def save_named_bytes(folder: Path, stem: str, data: bytes) -> dict[str, str]:
    """Write a safetensors file's bytes to ``folder/stem-<checksum>.safetensors``, as `save_named_tensors` does; raises StorageError."""
    checksum = hashlib.sha256(data).hexdigest()
    name = f"{stem}-{checksum[:16]}.safetensors"
    _write_unless_there(folder / name, data, checksum)
    return {"file": name, "sha256": checksum}


def load_tensors(path: Path, checksum: str) -> dict[str, Tensor]:
    """Read tensors whose file has the given SHA-256; raises CheckpointError if it is missing or damaged."""
    try:
        if sha256_of(path) != checksum:
            raise CheckpointError(f"{path} is damaged: its checksum differs from the recorded one")
        # Loaded tensors are views of the file; later writes to the file must not change them.
        return {name: value.clone() for name, value in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _seal(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, allow_nan=False).encode()).hexdigest()


def save_manifest(path: Path, facts: dict[str, Any]) -> None:
    """Write facts as JSON with their own checksum; raises StorageError."""
    plain = json.loads(json.dumps(facts, allow_nan=False))
    write_json(path, {**plain, "checksum": _seal(plain)})


def load_manifest(path: Path) -> dict[str, Any]:
    """Read facts written by `save_manifest`; raises CheckpointError if they are missing, cut off or changed."""
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        checksum = facts.pop("checksum")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if _seal(facts) != checksum:
        raise CheckpointError(f"{path} is damaged: its contents do not match their checksum")
    return facts


def save_record(stem: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write a record: ``stem.safetensors``, then ``stem.json``; raises StorageError."""
    checksum = save_tensors(stem.with_suffix(".safetensors"), tensors)
    save_manifest(stem.with_suffix(".json"), {"facts": facts, "tensors": checksum})


def load_record(stem: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a record; raises CheckpointError if any part is missing or damaged."""
    manifest = load_manifest(stem.with_suffix(".json"))
    return load_tensors(stem.with_suffix(".safetensors"), manifest["tensors"]), manifest["facts"]


def remove_record(stem: Path) -> None:
    """Delete a record, the manifest first."""
    stem.with_suffix(".json").unlink(missing_ok=True)
    stem.with_suffix(".safetensors").unlink(missing_ok=True)
