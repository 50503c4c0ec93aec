"""One extractor's folded weights in one contiguous piece of memory, and the file that it is saved in.

The file is a safetensors container with one uint8 tensor, `arena`, which starts at a multiple of 64 bytes, so that the mapped file can be
used as it is. Its metadata name the network and say where each tensor lies.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from der_fast.compaction.program import Op, program
from der_fast.errors import CheckpointError, ConfigError
from der_fast.files import sha256_of, write_bytes
from der_fast.kernels.dtypes import accumulator
from der_fast.model.architecture import Architecture, build_architecture

ALIGNMENT = 64
FORMAT, VERSION = "der_fast-arena", 1
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ArenaTensor:
    """Where one tensor lies.

    Attributes:
        name: as in `Op.tensors`.
        shape: logical, (K, C, R, S) for a weight, whatever the layout.
        offset: in bytes, a multiple of 64.
        dtype: of its entries.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size in bytes, without the gap after it."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class Arena:
    """One extractor's folded weights; `pack` makes it. Immutable: nothing may write to `storage`.

    Attributes:
        architecture: the backbone.
        widths: kept channels of every group.
        stored: the same, padded to multiples of `align`.
        align: stored widths are multiples of it.
        dtype: of the weights; biases, scales and shifts are float32 (float64 with float64).
        layout: 'KCRS' or 'KRSC', of the weights in memory.
        storage: uint8 (bytes,), at a multiple of 64 bytes.
        entries: where each tensor lies, in the order of `ops`.
    """

    architecture: Architecture
    widths: dict[str, int]
    stored: dict[str, int]
    align: int
    dtype: torch.dtype
    layout: str
    storage: Tensor
    entries: tuple[ArenaTensor, ...]

    @cached_property
    def ops(self) -> tuple[Op, ...]:
        """What the extractor computes, on stored channels; () if nothing is left of it."""
        return program(self.architecture, self.stored)

    @cached_property
    def feature_index(self) -> Tensor | None:
        """Positions of the true features among the stored ones, int64 on the storage's device; None if nothing is padded."""
        groups = self.architecture.features
        if all(self.widths[name] == self.stored[name] for name in groups):
            return None
        parts, before = [], 0
        for name in groups:
            parts.append(torch.arange(before, before + self.widths[name]))
            before += self.stored[name]
        return torch.cat(parts).to(self.storage.device)

    @property
    def features(self) -> int:
        """Number of true features."""
        return self.architecture.width(self.architecture.features, self.widths)

    @property
    def parameters(self) -> int:
        """Parameters of the compact network before folding, without padding: what the paper counts."""
        return self.architecture.parameters(self.widths)

    @property
    def stored_parameters(self) -> int:
        """Entries of all stored tensors, padding included."""
        return sum(torch.Size(entry.shape).numel() for entry in self.entries)

    @property
    def nbytes(self) -> int:
        """Size of the storage in bytes."""
        return self.storage.numel()

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor by name, as views of the storage; weights (K, C, R, S), channels-last strides with layout 'KRSC'."""
        return {entry.name: self._view(entry) for entry in self.entries}

    def _view(self, entry: ArenaTensor) -> Tensor:
        flat = self.storage[entry.offset : entry.offset + entry.nbytes].view(entry.dtype)
        if len(entry.shape) == 4 and self.layout == "KRSC":
            rows, columns, height, width = entry.shape
            return flat.view(rows, height, width, columns).permute(0, 3, 1, 2)
        return flat.view(entry.shape)

    def to(self, device: torch.device | str) -> Arena:
        """Return the arena on another device; itself if it is already there."""
        moved = self.storage.to(device)
        return self if moved is self.storage else dataclasses.replace(self, storage=moved)

    def to_bytes(self) -> bytes:
        """Return the file's content.

        Raises:
            ValueError: `build_architecture` cannot describe the architecture, so a file could not name it.
        """
        facts = json.dumps(self._facts(), sort_keys=True)
        content = self.storage.cpu().numpy().tobytes()
        metadata = {"format": FORMAT, "version": str(VERSION), "facts": facts, "sha256": _checksum(facts, content)}
        table = {"__metadata__": metadata, "arena": {"dtype": "U8", "shape": [len(content)], "data_offsets": [0, len(content)]}}
        header = json.dumps(table).encode()
        # The container allows spaces after its header; with the 8-byte length in front, the content starts at a multiple of 64.
        header += b" " * (-(len(header) + 8) % ALIGNMENT)
        return len(header).to_bytes(8, "little") + header + content

    def _facts(self) -> dict[str, Any]:
        architecture = self.architecture
        backbone = backbone_facts(architecture)
        if build_architecture(**backbone) != architecture:
            raise ValueError(f"an architecture that differs from {backbone} cannot be saved")
        return {
            **backbone,
            "widths": self.widths,
            "align": self.align,
            "dtype": str(self.dtype).removeprefix("torch."),
            "layout": self.layout,
            "offsets": {entry.name: entry.offset for entry in self.entries},
        }

    def save(self, path: str | Path) -> Path:
        """Write the arena atomically to `path`, usually ``*.safetensors``.

        Raises:
            StorageError: it cannot be written.
        """
        return write_bytes(path, self.to_bytes())

    @classmethod
    def load(cls, path: str | Path, sha256: str | None = None, architecture: Architecture | None = None) -> Arena:
        """Map a saved arena into memory; changes to the file's pages stay private to this process.

        Args:
            path: written by `save`.
            sha256: SHA-256 that the whole file must have, in hexadecimal; without it the checksum inside the file is checked.
            architecture: the network that it must belong to; None for any.

        Raises:
            CheckpointError: the file is missing, damaged, of another version, or belongs to another network.
        """
        return _load(Path(path), sha256, architecture)


def backbone_facts(architecture: Architecture) -> dict[str, Any]:
    """Return the arguments `backbone`, `width` and `stem` of `build_architecture` that describe `architecture`."""
    width = architecture.width(architecture.stem.target)
    return {"backbone": architecture.name, "width": width, "stem": "imagenet" if architecture.pool else "small"}


def _checksum(facts: str, content: bytes | memoryview) -> str:
    digest = hashlib.sha256(facts.encode())
    digest.update(content)
    return digest.hexdigest()


def _load(path: Path, sha256: str | None, architecture: Architecture | None) -> Arena:
    again = "save the arena again, or copy the file again from where it was made"
    try:
        if sha256 is not None and sha256_of(path) != sha256:
            raise CheckpointError(f"{path} is damaged: its checksum differs from the one recorded when it was written; {again}")
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT or file.keys() != ["arena"]:
                raise CheckpointError(f"{path} is not an arena of der_fast; give a file that Arena.save wrote")
            if metadata.get("version") != str(VERSION):
                raise CheckpointError(
                    f"{path} is an arena of version {metadata.get('version')}, but this der_fast reads version {VERSION}; "
                    "read it with the der_fast that wrote it"
                )
            storage = file.get_tensor("arena")
    except FileNotFoundError:
        raise CheckpointError(f"there is no arena {path}") from None
    except OSError as error:
        raise CheckpointError(f"cannot read the arena {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or not an arena of der_fast ({error}); {again}") from error
    if sha256 is None and _checksum(metadata.get("facts", ""), memoryview(storage.numpy())) != metadata.get("sha256"):
        raise CheckpointError(f"{path} is damaged: its content does not match its checksum; {again}")
    try:
        arena = _restored(json.loads(metadata["facts"]), storage)
    except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as error:
        raise CheckpointError(f"{path} describes a network that der_fast does not know ({error}); {again}") from error
    if architecture is not None and arena.architecture != architecture:
        found, wanted = backbone_facts(arena.architecture), backbone_facts(architecture)
        raise CheckpointError(f"{path} belongs to another network: {found}, not {wanted}; give the arena of this run")
    return arena


def _restored(facts: Mapping[str, Any], storage: Tensor) -> Arena:
    """Build the arena that `facts` describe; raises ValueError and the like if they contradict themselves or the storage."""
    architecture = build_architecture(facts["backbone"], width=facts["width"], stem=facts["stem"])
    widths, align, dtype, layout = facts["widths"], facts["align"], DTYPES[facts["dtype"]], facts["layout"]
    if widths.keys() != architecture.groups.keys() or layout not in ("KCRS", "KRSC") or not 1 <= align <= 1024:
        raise ValueError("groups, layout or align are not valid for an arena")
    if not all(0 <= widths[name] <= full for name, full in architecture.groups.items()):
        raise ValueError("widths exceed the network's")
    widths = {name: int(widths[name]) for name in architecture.groups}
    stored = {name: -(-width // align) * align for name, width in widths.items()}
    entries, end = [], 0
    for op in program(architecture, stored):
        for name, shape in op.tensors().items():
            entry = ArenaTensor(name, shape, int(facts["offsets"][name]), dtype if name.endswith(".weight") else accumulator(dtype))
            if entry.offset % ALIGNMENT or entry.offset < end:
                raise ValueError(f"{name} lies at byte {entry.offset}")
            end = entry.offset + entry.nbytes
            entries.append(entry)
    if end > storage.numel() or len(entries) != len(facts["offsets"]):
        raise ValueError(f"{len(entries)} tensors end at byte {end}, but the storage has {storage.numel()} bytes")
    if storage.data_ptr() % ALIGNMENT:
        storage = storage.clone()
    return Arena(architecture, widths, stored, align, dtype, layout, storage, tuple(entries))
