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
from safetensors.torch import load_file, save_file
from torch import Tensor

from der_fast.errors import CheckpointError
from der_fast.files import sha256_of, write_atomically, write_json


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write tensors to `path` atomically and return the file's SHA-256; raises StorageError."""
    ready = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_atomically(path, lambda temporary: save_file(ready, temporary))
    return sha256_of(path)


def load_tensors(path: Path, checksum: str) -> dict[str, Tensor]:
    """Read tensors whose file has the given SHA-256; raises CheckpointError where it is missing or damaged."""
    try:
        if sha256_of(path) != checksum:
            raise CheckpointError(f"{path} is damaged: its checksum is not the one that was written down")
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _seal(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, allow_nan=False).encode()).hexdigest()


def save_manifest(path: Path, facts: dict[str, Any]) -> None:
    """Write facts as JSON with a checksum of themselves; raises StorageError."""
    plain = json.loads(json.dumps(facts, allow_nan=False))
    write_json(path, {**plain, "checksum": _seal(plain)})


def load_manifest(path: Path) -> dict[str, Any]:
    """Read facts written by `save_manifest`; raises CheckpointError where they are missing, cut off or changed."""
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        checksum = facts.pop("checksum")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if _seal(facts) != checksum:
        raise CheckpointError(f"{path} is damaged: its contents do not match their checksum")
    return facts


def save_record(stem: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write a record: ``stem.safetensors``, then ``stem.json``; raises StorageError."""
    checksum = save_tensors(stem.with_suffix(".safetensors"), tensors)
    save_manifest(stem.with_suffix(".json"), {"facts": facts, "tensors": checksum})


def load_record(stem: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a record; raises CheckpointError where any part is missing or damaged."""
    manifest = load_manifest(stem.with_suffix(".json"))
    return load_tensors(stem.with_suffix(".safetensors"), manifest["tensors"]), manifest["facts"]


def remove_record(stem: Path) -> None:
    """Delete a record, the manifest first."""
    stem.with_suffix(".json").unlink(missing_ok=True)
    stem.with_suffix(".safetensors").unlink(missing_ok=True)
