"""The network as a .safetensors file, whose metadata holds everything else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from der_fast.compaction.arena import backbone_facts
from der_fast.compaction.program import program
from der_fast.deployment.facts import Facts
from der_fast.deployment.network import FEATURE_INDEX, HEAD_BIAS, HEAD_WEIGHT, FoldedExtractor, FoldedNetwork, Run, runner, tensor_name
from der_fast.errors import ExportError, UserError
from der_fast.model.architecture import Architecture, build_architecture
from der_fast.model.readout import Readout

# One key for everything: safetensors writes several in an order that differs from file to file.
_KEY, _NETWORK = "der_fast", "network"
_TEXTS_SHA256 = "metadata_sha256"


def write_safetensors(path: Path, network: FoldedNetwork, facts: Facts) -> None:
    """Write the network to `path`; raises OSError if it cannot be written."""
    described = {**backbone_facts(network.architecture), "extractors": [dict(extractor.widths) for extractor in network.extractors]}
    texts = {**facts.to_texts(), _NETWORK: json.dumps(described)}
    texts = {**texts, _TEXTS_SHA256: _checksum(texts)}
    path.write_bytes(save(dict(network.named_tensors()), {_KEY: json.dumps(texts, ensure_ascii=False)}))


def _checksum(texts: Mapping[str, str]) -> str:
    """The SHA-256 of every text and its key: a flipped bit would change a class name and leave the weights' checksum right."""
    return hashlib.sha256(json.dumps(sorted(texts.items())).encode()).hexdigest()


def read_safetensors(path: Path, device: torch.device) -> tuple[Facts, Run]:
    """Open an exported file.

    Args:
        path: the file.
        device: where the network runs.

    Returns:
        The facts, and what runs the network.

    Raises:
        ExportError: der_fast did not export the file, or it is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Loaded tensors are views of the file; later writes to the file must not change them.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{path} is not a readable .safetensors file: {error}. Export the run again") from error
    try:
        texts = dict(json.loads(metadata.get(_KEY, "{}")))
    except (TypeError, ValueError) as error:
        raise ExportError(f"{path} is damaged: its metadata cannot be read ({error!r}). Export the run again") from error
    facts = Facts.from_texts(texts, str(path))
    written = texts.pop(_TEXTS_SHA256, None)
    try:
        network = _network(json.loads(texts[_NETWORK]), tensors, facts)
    except (AttributeError, KeyError, TypeError, ValueError, UserError) as error:
        raise ExportError(f"{path} is damaged: its network cannot be built ({error!r}). Export the run again") from error
    if network.checksum != facts.weights_sha256:
        raise ExportError(f"{path} is damaged: the checksum of its weights differs from the recorded one. Export the run again")
    # Older files have no checksum, but no unknown keys either: a damaged checksum key counts as unknown.
    if written != _checksum(texts) and (written is not None or not set(texts) <= {*facts.to_texts(), _NETWORK}):
        raise ExportError(f"{path} is damaged: the checksum of its metadata differs from the recorded one. Export the run again")
    return facts, runner(network, facts.preprocessing.transform(), device)


def _network(value: Mapping[str, Any], tensors: dict[str, Tensor], facts: Facts) -> FoldedNetwork:
    architecture = build_architecture(value["backbone"], width=value["width"], stem=value["stem"])
    extractors = tuple(_extractor(architecture, widths, tensors, number) for number, widths in enumerate(value["extractors"], 1))
    weight, bias = tensors[HEAD_WEIGHT], tensors[HEAD_BIAS]
    classes, features = len(facts.class_names), sum(extractor.features for extractor in extractors)
    readout = Readout(weight, bias, facts.normalise, facts.proxies, facts.temperature)
    if (readout.classes, readout.features) != (classes, features):
        raise ValueError(f"a classifier of shape {tuple(weight.shape)} for {features} features and {classes} classes")
    return FoldedNetwork(architecture, extractors, readout)


def _extractor(architecture: Architecture, widths: Any, tensors: Mapping[str, Tensor], number: int) -> FoldedExtractor:
    if set(widths) != set(architecture.groups) or not all(isinstance(width, int) and width >= 0 for width in widths.values()):
        raise ValueError(f"widths that do not fit {architecture.name}: {widths}")
    ops = program(architecture, widths)
    own = {}
    for op in ops:
        for name, shape in op.tensors().items():
            own[name] = tensors[tensor_name(number, name)]
            if own[name].shape != shape or own[name].dtype != torch.float32:
                raise ValueError(f"{tensor_name(number, name)} is {own[name].dtype} {tuple(own[name].shape)}, not float32 {shape}")
    index = tensors.get(tensor_name(number, FEATURE_INDEX))
    stored = ops[-1].outputs if ops else 0
    if index is not None and not (index.dtype == torch.int64 and index.dim() == 1 and bool(((index >= 0) & (index < stored)).all())):
        raise ValueError(f"{tensor_name(number, FEATURE_INDEX)} does not name features")
    return FoldedExtractor(widths, ops, own, index)
