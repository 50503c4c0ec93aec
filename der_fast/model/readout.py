"""How every classifier is used at test time: a linear map of features, normalised or not, one or several proxies per class.

    u = f, or f / ‖f‖ with `normalise`
    s = W·u + b                                   one score per proxy
    s_c = Σ_p softmax(s_c)_p · s_c,p              if a class has several proxies
    p(y | x) = softmax(s / T)                     (eq. 14)

DER, weight alignment and a folded bias correction are linear. A cosine classifier has unit rows, normalised features and T = 1/η.
Nearest class means have unit means as rows, normalised features and T = ½. Evaluation, prediction, saving and export therefore
need only this rule and know no method.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Readout:
    """A classifier at test time.

    Attributes:
        weight: (C · proxies, F) float32; the proxies of a class lie together.
        bias: (C · proxies,) float32.
        normalise: features are divided by their length first.
        proxies: rows per class.
        temperature: probabilities are softmax(scores / temperature).

    Raises:
        ValueError: shapes that do not fit, or a temperature that is not above 0.
    """

    weight: Tensor
    bias: Tensor
    normalise: bool = False
    proxies: int = 1
    temperature: float = 1.0

    def __post_init__(self) -> None:
        rows = self.weight.shape[0]
        if self.weight.dim() != 2 or self.bias.shape != (rows,) or self.proxies < 1 or rows % self.proxies:
            raise ValueError(
                f"a readout needs a weight (C · proxies, F) and a bias (C · proxies,), not {tuple(self.weight.shape)} and "
                f"{tuple(self.bias.shape)} with {self.proxies} proxies"
            )
        if not self.temperature > 0:
            raise ValueError(f"a readout's temperature must be above 0, not {self.temperature}")

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.weight.shape[0] // self.proxies

    @property
    def features(self) -> int:
        """Length of the features."""
        return self.weight.shape[1]

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return self.weight.numel() + self.bias.numel()

    def __call__(self, features: Tensor) -> Tensor:
        """Return the scores (N, C) of features (N, F), both float32 and on the readout's device."""
        scores = F.linear(F.normalize(features, dim=1) if self.normalise else features, self.weight, self.bias)
        if self.proxies == 1:
            return scores
        grouped = scores.reshape(len(scores), self.classes, self.proxies)
        return (torch.softmax(grouped, 2) * grouped).sum(2)

    def probabilities(self, scores: Tensor) -> Tensor:
        """Return the probabilities (N, C) of scores (N, C)."""
        return torch.softmax(scores / self.temperature, 1)

    def of_classes(self, classes: Tensor) -> Readout:
        """Return the readout for some classes only, (kept,) int64 positions: their scores do not change, up to rounding."""
        rows = (classes[:, None] * self.proxies + torch.arange(self.proxies, device=classes.device)).flatten().to(self.weight.device)
        return replace(self, weight=self.weight[rows], bias=self.bias[rows])

    def blank(self, features: int) -> Readout:
        """Return a readout of the same kind and number of classes over `features` features, with all weights zero."""
        return replace(self, weight=self.weight.new_zeros(len(self.weight), features), bias=torch.zeros_like(self.bias))

    def to(self, device: torch.device) -> Readout:
        """Return the same readout on another device."""
        return replace(self, weight=self.weight.to(device), bias=self.bias.to(device))


def linear_readout(layer: nn.Linear, temperature: float = 1.0) -> Readout:
    """Return a trained linear layer as a readout, which shares the layer's tensors."""
    return Readout(layer.weight.detach(), layer.bias.detach(), temperature=temperature)
