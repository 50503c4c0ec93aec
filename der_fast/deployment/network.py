"""The finished model in the form that every export uses: a program and folded weights per extractor, and the classifier."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from der_fast.compaction import Arena
from der_fast.compaction.bank.execute import execute
from der_fast.compaction.bank.extractor import CompactExtractor
from der_fast.compaction.program import Op
from der_fast.data import Transform
from der_fast.kernels.forked import fit_to_compute
from der_fast.model.architecture import Architecture
from der_fast.model.readout import Readout
from der_fast.training.model import Model

# Runs a network from any source: uint8 images (N, H, W, 3) of the stored size → logits and probabilities, (N, C), on the CPU.
Run = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class FoldedExtractor:
    """One extractor.

    Attributes:
        widths: stored channels of every group.
        ops: its program, `program(architecture, widths)`.
        tensors: the folded weights by name, float32.
        feature_index: int64, positions of the true features among the stored ones; None if nothing is padded.
    """

    widths: Mapping[str, int]
    ops: tuple[Op, ...]
    tensors: Mapping[str, Tensor]
    feature_index: Tensor | None = None

    @property
    def features(self) -> int:
        """Length of the feature vector that the classifier reads."""
        if self.feature_index is not None:
            return len(self.feature_index)
        return self.ops[-1].outputs if self.ops else 0


@dataclass(frozen=True)
class FoldedNetwork:
    """From normalised images to logits.

    Attributes:
        architecture: of every extractor.
        extractors: the extractors in learning order.
        readout: the classifier, over Σ features, float32.
    """

    architecture: Architecture
    extractors: tuple[FoldedExtractor, ...]
    readout: Readout

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and probabilities, both (N, C), for normalised images (N, 3, H, W) float32 on the weights' device."""
        rows = [images.new_zeros(images.shape[0], 0)]
        for extractor in self.extractors:
            features = execute(extractor.ops, extractor.tensors, images)
            rows.append(features if extractor.feature_index is None else features[:, extractor.feature_index])
        logits = self.readout(torch.cat(rows, 1))
        return logits, self.readout.probabilities(logits)

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor with its name, extractors in order, then the classifier."""
        for number, extractor in enumerate(self.extractors, 1):
            for name, tensor in extractor.tensors.items():
                yield tensor_name(number, name), tensor
            if extractor.feature_index is not None:
                yield tensor_name(number, FEATURE_INDEX), extractor.feature_index
        yield HEAD_WEIGHT, self.readout.weight
        yield HEAD_BIAS, self.readout.bias

    @cached_property
    def checksum(self) -> str:
        """SHA-256 over names, shapes and little-endian contents of all tensors: the same for every format a model is exported to."""
        digest = hashlib.sha256()
        for name, tensor in self.named_tensors():
            array = tensor.detach().cpu().contiguous().numpy()
            digest.update(f"{name} {list(array.shape)}\n".encode())
            digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
        return digest.hexdigest()

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(tensor.numel() * tensor.element_size() for _, tensor in self.named_tensors())

    def to(self, device: torch.device) -> FoldedNetwork:
        """Return the same network with its tensors on another device."""
        extractors = tuple(
            replace(
                extractor,
                tensors={name: tensor.to(device) for name, tensor in extractor.tensors.items()},
                feature_index=None if extractor.feature_index is None else extractor.feature_index.to(device),
            )
            for extractor in self.extractors
        )
        return replace(self, extractors=extractors, readout=self.readout.to(device))


FEATURE_INDEX = "feature_index"
HEAD_WEIGHT, HEAD_BIAS = "head.weight", "head.bias"


def tensor_name(number: int, name: str) -> str:
    """Return the name of a tensor of the `number`-th extractor (from 1) within the whole network."""
    return f"extractor.{number}.{name}"


def runner(network: FoldedNetwork, transform: Transform, device: torch.device) -> Run:
    """Return a function that runs `transform` and the network in plain PyTorch on `device`."""
    placed = network.to(device)

    @torch.no_grad()
    def run(pixels: Tensor) -> tuple[Tensor, Tensor]:
        fit_to_compute(device)
        logits, probabilities = placed(transform(pixels, device=device))
        return logits.cpu(), probabilities.cpu()

    return run


def network_of(model: Model) -> FoldedNetwork:
    """Extract the network of a learner's model, on the CPU.

    Raises:
        DerFastError: nothing has been learned yet.
    """
    readout = model.ready
    weight, bias = (tensor.float().cpu().contiguous() for tensor in (readout.weight, readout.bias))
    extractors = tuple(extractor_of(cast(CompactExtractor, extractor).arena) for extractor in model.network.bank.extractors)
    return FoldedNetwork(model.network.architecture, extractors, replace(readout, weight=weight, bias=bias))


def extractor_of(arena: Arena) -> FoldedExtractor:
    """Extract an extractor's program and weights from its arena, as contiguous float32 tensors on the CPU."""
    # A copy: the arena may be mapped from a file, and its bank may be gone before this object is.
    tensors = {name: tensor.to("cpu", torch.float32, copy=True).contiguous() for name, tensor in arena.tensors().items()}
    index = arena.feature_index
    return FoldedExtractor(arena.stored, arena.ops, tensors, None if index is None else index.cpu())
