"""The classifier on the super-feature and the auxiliary classifier on the new extractor's features."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, nn


def new_classifier(features: int, classes: int, generator: torch.Generator) -> nn.Linear:
    """Return a linear layer (features → classes) drawn uniformly from ±1/√features (PyTorch's default), from `generator`."""
    layer = _linear(features, classes)
    initialise_classifier(layer, generator)
    return layer


@torch.no_grad()
def initialise_classifier(layer: nn.Linear, generator: torch.Generator) -> None:
    """Draw a linear layer again, in place."""
    bound = 1 / math.sqrt(max(layer.in_features, 1))
    for parameter in (layer.weight, layer.bias):
        parameter.copy_((torch.rand(parameter.shape, generator=generator) * 2 - 1) * bound)


@torch.no_grad()
def grow_classifier(old: nn.Linear | None, features: int, classes: int, generator: torch.Generator) -> nn.Linear:
    """Return a classifier for more features and classes that starts as `old` on the old features and classes.

    Args:
        old: the previous classifier, or None.
        features, classes: the new sizes, at least the old ones.
        generator: draws the new entries.
    """
    layer = new_classifier(features, classes, generator)
    if old is not None:
        layer.weight[: old.out_features, : old.in_features] = old.weight
        layer.bias[: old.out_features] = old.bias
    return layer


@torch.no_grad()
def slice_classifier(layer: nn.Linear, keep: Tensor, constant: Tensor | None = None) -> nn.Linear:
    """Return the classifier that reads only the kept features.

    Args:
        layer: (classes, features).
        keep: boolean (features,).
        constant: (features,) the constant values of dropped features, which are added to the bias; None if they are zero.
    """
    sliced = _linear(int(keep.sum()), layer.out_features).to(layer.weight)
    sliced.weight.copy_(layer.weight[:, keep])
    sliced.bias.copy_(layer.bias)
    if constant is not None:
        sliced.bias.add_(layer.weight[:, ~keep] @ constant[~keep])
    return sliced


@torch.no_grad()
def spread_classifier(layer: nn.Linear, columns: Tensor, features: int) -> nn.Linear:
    """Return the classifier that reads the same features among others, which it ignores: their weights are zero.

    Args:
        layer: (classes, narrow features).
        columns: (narrow features,) int64, their positions among the others.
        features: how many there are then.
    """
    spread = _linear(features, layer.out_features).to(layer.weight)
    spread.weight.zero_().index_copy_(1, columns, layer.weight)
    spread.bias.copy_(layer.bias)
    return spread


@torch.no_grad()
def keep_classes(layer: nn.Linear, rows: Tensor) -> nn.Linear:
    """Return the classifier for some classes only, with the weights of `layer`: their logits do not change, up to rounding.

    Args:
        layer: (classes, features).
        rows: (kept,) int64, positions of the classes to keep.
    """
    kept = _linear(layer.in_features, len(rows)).to(layer.weight)
    kept.weight.copy_(layer.weight[rows])
    kept.bias.copy_(layer.bias[rows])
    return kept


def auxiliary_targets(labels: Tensor, known: int) -> Tensor:
    """Map labels to the auxiliary classifier's: 0 for any of the `known` old classes, 1 … for the new ones (eq. 3)."""
    return (labels - known + 1).clamp(min=0)


def _linear(features: int, classes: int) -> nn.Linear:
    with warnings.catch_warnings():
        # An extractor of width 0 is legal and reported where it is dropped; PyTorch's warning would only confuse.
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
        return nn.Linear(features, classes)
