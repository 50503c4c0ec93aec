"""How the weight λ_s of the sparsity loss follows a parameter budget, computed on the device of the mask logits without reading from it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from der_fast.config.schema import MasksConfig
from der_fast.model.architecture import Groups
from der_fast.model.layout import MaskLayout

# λ_s is chosen once in at most so many batches, but at least so often per epoch and in all: with fewer, the last choices push too far.
MOST_BATCHES, LEAST_PER_EPOCH, LEAST = 8, 4, 40
# The least mean gradient of the sparsity loss that λ_s is divided by.
_LEAST_PULL = 1e-12


class Budget:
    """Finds the threshold on mask logits that leaves a given share of the parameters.

    It is the smallest τ such that keeping e_c > τ·w_c (and the floor) leaves at most the target share. The weights w_c are the
    channels' prices to the power `masks.price_power`: expensive channels go first. The candidates for τ are the scores e_c / w_c
    themselves, in descending order: with the j-th one, the first j channels stay. Only the number of channels that each group keeps
    matters, because all prices in a group are the same. With these numbers n, (G,), the parameters are n·(Q n + q), because every
    convolution has area × inputs × outputs of them. All numbers are whole and in double precision, so the result is exact.

    Nothing here copies a number to or from the device.

    Args:
        layout: the full network's mask layout.
        config: `target_params` (share of the parameters, in (0, 1]), `price_power` and `floor`.
        device: where the logits lie.
    """

    def __init__(self, layout: MaskLayout, config: MasksConfig, device: torch.device) -> None:
        assert config.target_params is not None
        architecture = layout.architecture
        self.most = _most_parameters(config.target_params, architecture.parameters())
        self.weights = layout.prices().pow(config.price_power).to(device)
        terms = layout.sparsity_terms(torch.float64, device)
        self._members = terms["membership"].contiguous()
        by_area = terms["writes"].t() * terms["area"]

        def table(rows: Sequence[Groups]) -> Tensor:
            entries = [[float(row.count(name)) for name in layout.names] for row in rows]
            return torch.tensor(entries, dtype=torch.float64, device=device).reshape(len(rows), len(layout.names))

        # Q and q without batch-norm, which the sparsity loss does not count.
        self._pairs, alone = by_area @ terms["reads"], by_area @ terms["image"]
        self._singles = (alone + 2 * table(architecture.norms()).sum(0))[:, None]
        streams = set(layout.stream_groups())
        least = [least_kept(width, config.floor) if name in streams else 0 for name, width in architecture.groups.items()]
        self._least = torch.tensor(least, dtype=torch.float64, device=device)[:, None]
        self._path = table([architecture.stem.target, *(block.target for block in architecture.blocks)])
        inner = [(number, conv.target) for number, block in enumerate(architecture.blocks) for conv in block.convs[:-1]]
        self._inner = table([groups for _, groups in inner])
        owners = torch.tensor([number for number, _ in inner], device=device)
        # (I, I): which inner convolutions belong to the same block.
        self._together = (owners[:, None] == owners[None]).double()
        self._alone = len({number for number, _ in inner}) == len(inner)
        sizes = self._members.sum(1)
        # The mean over channels of the sparsity loss's gradient is linear in the sums of the masks.
        divisor = (sizes @ (self._pairs @ sizes + alone)) * layout.channels
        self._slope, self._constant = (self._pairs + self._pairs.t()) / divisor, alone / divisor

    def threshold(self, logits: Tensor) -> Tensor:
        """Return τ for logits (C,), a scalar of their dtype; the largest score if the floor alone exceeds the target."""
        ordered, order = (logits / self.weights).sort(descending=True)
        kept = torch.maximum(self._members.index_select(1, order).cumsum(1), self._least)
        # More channels never have fewer parameters, and equal scores stand together: among them, the first one decides.
        meeting = (self._parameters(kept) <= self.most).sum(0, keepdim=True)
        return torch.cat([ordered, ordered[-1:] - 1]).index_select(0, meeting).squeeze(0)

    def _parameters(self, kept: Tensor) -> Tensor:
        """Parameters that remain (J,) for numbers of kept channels per group (G, J), as `compaction.live_widths` counts them."""
        if not self._alone:
            lost = self._together @ (self._inner @ kept == 0).double() > 0
            kept = kept.masked_fill(self._inner.t() @ lost.double() > 0, 0.0)
        whole = (self._path @ kept).amin(0) > 0
        return (kept * torch.addmm(self._singles, self._pairs, kept)).sum(0) * whole

    def pull(self, logits: Tensor) -> Tensor:
        """Return the mean over channels of ∂L_S/∂e, compensated, at the soft masks σ(e): a scalar, float64."""
        soft = torch.sigmoid(logits).double()
        slope = torch.addmv(self._constant, self._slope, self._members @ soft)
        return (self._members @ (soft * (1 - soft))) @ slope


def _most_parameters(target: float, total: int) -> int:
    """Return the largest number of parameters whose share of `total` is at most `target`, rounding included."""
    most = int(target * total)
    while (most + 1) / total <= target:
        most += 1
    while most / total > target:
        most -= 1
    return most


def least_kept(width: int, floor: float) -> int:
    """Return ⌈floor · width⌉, the number of channels of a stream of `width` that always stay."""
    # 0.07 · 100 is 7.000000000000001 in floats, and must not cost an eighth channel.
    return math.ceil(floor * width - 1e-9)


def budget_threshold(layout: MaskLayout, logits: Tensor, config: MasksConfig) -> float:
    """Return `Budget.threshold` of the logits (C,) as a number."""
    return float(Budget(layout, config, logits.device).threshold(logits))


def interval(batches: int, epochs: int) -> int:
    """Return n: λ_s is chosen before every n-th batch, if `epochs` of `batches` learn masks. In short schedules it is every batch."""
    return max(1, min(MOST_BATCHES, batches // LEAST_PER_EPOCH, batches * epochs // LEAST))


class SparsityController:
    """Chooses λ_s: a constant, or the weight that moves the ranking of channels across zero in time.

    With a target, the threshold τ that would meet the budget now must fall to 0 in the R batches that remain. The sparsity loss
    alone moves a logit by λ_s · lr · ∂L_S/∂e per batch, so the required weight is λ_s = τ / (R · lr · ∂L_S/∂e), with the
    mean over channels for ∂L_S/∂e. It is chosen between batches, so a step that a CUDA graph holds only reads it.

    `masks.sparsity` bounds it from above: in a short schedule a larger weight drags whole streams to zero before the task loss
    can object (docs/pruning.md has the measurement). It is also used if no weight moves a logit (masks.lr = 0). `meet_budget` removes
    what exceeds the budget when the masks become binary.

    Args:
        config: the masks' configuration.
        batches: number of batches that learn masks, over all epochs.
        layout: the full network's mask layout.
        device: where the logits lie.
        every: choose it once in so many batches; see `interval`.

    Attributes:
        value: λ_s as the loss reads it, a scalar, float32 on `device`.
    """

    def __init__(self, config: MasksConfig, batches: int, layout: MaskLayout, device: torch.device, *, every: int = 1) -> None:
        self.config, self.batches, self.every = config, batches, every
        self._exact = torch.tensor(config.sparsity, dtype=torch.float64, device=device)
        self.value = self._exact.float()
        follows = config.target_params is not None and config.lr * _LEAST_PULL > 0
        self._budget = Budget(layout, config, device) if follows else None

    @property
    def weight(self) -> float:
        """λ_s as a number in double precision, read from the device."""
        return float(self._exact)

    @weight.setter
    def weight(self, weight: float) -> None:
        self._exact.fill_(weight)
        self.value.copy_(self._exact)

    @torch.no_grad()
    def follow(self, batch: int, logits: Tensor) -> None:
        """Choose λ_s before batch `batch` (0-based, counted over all epochs that learn masks), from the mask logits (C,), if it is due."""
        if self._budget is None or batch % self.every:
            return
        moved = self._budget.pull(logits).clamp_(min=_LEAST_PULL).mul_(max(self.batches - batch, 1) * self.config.lr)
        threshold = self._budget.threshold(logits).clamp_(min=0)
        torch.div(threshold, moved, out=self._exact).clamp_(max=self.config.sparsity)
        self.value.copy_(self._exact)
