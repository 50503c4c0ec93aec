"""Padding channels with zeros to whole blocks, for runtimes that compute in blocks; the result does not change."""

from __future__ import annotations

from dataclasses import replace

import torch

from der_fast.compaction.program import AFFINE, BIAS, CONV, program
from der_fast.compaction.selection import among_dead
from der_fast.compaction.units import AFFINE as AFFINE_UNIT
from der_fast.compaction.units import CONSTANT, CONVOLUTION, units
from der_fast.deployment.network import FoldedExtractor, FoldedNetwork
from der_fast.model.architecture import Architecture

_KINDS = {CONV: CONVOLUTION, BIAS: CONSTANT, AFFINE: AFFINE_UNIT}


def padded_network(network: FoldedNetwork, multiple: int) -> FoldedNetwork:
    """Return the network with every group's stored channels padded to a multiple; groups without channels stay empty."""
    return replace(network, extractors=tuple(_padded(extractor, network.architecture, multiple) for extractor in network.extractors))


def _padded(extractor: FoldedExtractor, architecture: Architecture, multiple: int) -> FoldedExtractor:
    selection = among_dead(architecture, extractor.widths, multiple)
    if selection.wide == dict(extractor.widths):
        return extractor
    groups = {(unit.name, unit.kind): (unit.source, unit.target) for unit in units(architecture)}
    ops, tensors = program(architecture, selection.wide), {}
    for op in ops:
        for name, shape in op.tensors().items():
            source, target = groups[op.target, _KINDS[op.kind]]
            wide = torch.zeros(shape, dtype=extractor.tensors[name].dtype)
            # The image's channels, which belong to no group, are not padded.
            whole = len(shape) == 1 or not source
            where = (selection.rows(target),) if whole else (selection.rows(target)[:, None], selection.rows(source))
            wide[where] = extractor.tensors[name]
            tensors[name] = wide
    index = selection.rows(architecture.features) if ops else None
    if index is not None and extractor.feature_index is not None:
        index = index[extractor.feature_index]
    return FoldedExtractor(selection.wide, ops, tensors, index)
