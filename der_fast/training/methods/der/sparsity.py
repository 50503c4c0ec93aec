"""How the weight λ_s of the sparsity loss follows a parameter budget, computed on the device of the mask logits without reading from it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from der_fast.config.schema import MasksConfig
from der_fast.model.architecture import Groups
from der_fast.model.layout import MaskLayout


class Budget:
    """Finds the threshold on mask logits that leaves a given share of the parameters.

    It is the smallest τ such that keeping e_c > τ·w_c (and the floor) leaves at most the target share. The weights w_c are the
    channels' prices to the power `masks.price_power`: expensive channels go first. The candidates for τ are the scores e_c / w_c
    themselves. For each, only the number of channels that each group keeps matters, because all prices in a group are the same. Counts
    are whole numbers in double precision, so the result is exact.

    Nothing here copies a number to or from the device, so a CUDA graph can hold it.

    Args:
        layout: the full network's mask layout.
        config: `target_params` (share of the parameters, in (0, 1]), `price_power` and `floor`.
        device: where the logits lie.
    """

    def __init__(self, layout: MaskLayout, config: MasksConfig, device: torch.device) -> None:
        assert config.target_params is not None
        architecture = layout.architecture
        self.target, self.total = config.target_params, architecture.parameters()
        self.weights = layout.prices().pow(config.price_power).to(device)
        terms = layout.sparsity_terms(torch.float64, device)
        self._members, self._area, self._image = terms["membership"].t(), terms["area"], terms["image"]
        self._reads, self._writes = terms["reads"].t(), terms["writes"].t()

        def table(rows: Sequence[Groups]) -> Tensor:
            entries = [[float(row.count(name)) for row in rows] for name in layout.names]
            return torch.tensor(entries, dtype=torch.float64, device=device).reshape(len(layout.names), len(rows))

        streams = set(layout.stream_groups())
        least = [least_kept(width, config.floor) if name in streams else 0 for name, width in architecture.groups.items()]
        self._least = torch.tensor(least, dtype=torch.float64, device=device)
        self._norms = 2 * table(architecture.norms()).sum(1)
        self._path = table([architecture.stem.target, *(block.target for block in architecture.blocks)])
        inner = [(number, conv.target) for number, block in enumerate(architecture.blocks) for conv in block.convs[:-1]]
        self._inner = table([groups for _, groups in inner])
        owners = torch.tensor([number for number, _ in inner], device=device)
        # (I, I): which inner convolutions belong to the same block.
        self._together = (owners[:, None] == owners[None]).double()

    def threshold(self, logits: Tensor) -> Tensor:
        """Return τ for logits (C,), a scalar of their dtype; the largest score if the floor alone exceeds the target."""
        scores = logits / self.weights
        ordered, order = scores.sort()
        candidates = torch.cat([ordered[:1] - 1, ordered])
        # Row i: for every group, the number of its scores from position i on.
        above = self._members.index_select(0, order).flip(0).cumsum(0).flip(0)
        above = torch.cat([above, torch.zeros_like(above[:1])])
        kept = above.index_select(0, torch.searchsorted(ordered, candidates, right=True))
        meets = self._parameters(torch.maximum(kept, self._least)) / self.total <= self.target
        meets[-1:].fill_(True)
        return candidates.index_select(0, meets.to(torch.uint8).argmax(0, keepdim=True)).squeeze(0)

    def _parameters(self, kept: Tensor) -> Tensor:
        """Parameters that remain (J,) for numbers of kept channels per group (J, G), as `compaction.live_widths` counts them."""
        lost = (kept @ self._inner == 0).double() @ self._together > 0
        kept = kept.masked_fill(lost.double() @ self._inner.t() > 0, 0.0)
        kept = kept.masked_fill((kept @ self._path == 0).any(1, keepdim=True), 0.0)
        return (self._area * (kept @ self._reads + self._image) * (kept @ self._writes)).sum(1) + kept @ self._norms

    def pull(self, logits: Tensor) -> Tensor:
        """Return the mean over channels of ∂L_S/∂e, compensated, at the soft masks σ(e): a scalar, float64."""
        soft = torch.sigmoid(logits).double()
        sums, sizes = soft @ self._members, self._members.sum(0)
        inputs, outputs = sums @ self._reads + self._image, sums @ self._writes
        slope = self._reads @ (self._area * outputs) + self._writes @ (self._area * inputs)
        full = (self._area * (sizes @ self._reads + self._image) * (sizes @ self._writes)).sum()
        return ((soft * (1 - soft)) @ self._members) @ slope / full / len(logits)


def least_kept(width: int, floor: float) -> int:
    """Return ⌈floor · width⌉, the number of channels of a stream of `width` that always stay."""
    # 0.07 · 100 is 7.000000000000001 in floats, and must not cost an eighth channel.
    return math.ceil(floor * width - 1e-9)


def budget_threshold(layout: MaskLayout, logits: Tensor, config: MasksConfig) -> float:
    """Return `Budget.threshold` of the logits (C,) as a number."""
    return float(Budget(layout, config, logits.device).threshold(logits))


class SparsityController:
    """Chooses λ_s: a constant, or the weight that moves the ranking of channels across zero in time.

    With a target, the threshold τ that would meet the budget now must fall to 0 in the R batches that remain. The sparsity loss
    alone moves a logit by λ_s · lr · ∂L_S/∂e per batch, so the required weight is λ_s = τ / (R · lr · ∂L_S/∂e), with the
    mean over channels for ∂L_S/∂e.

    `masks.sparsity` bounds it from above: in a short schedule a larger weight drags whole streams to zero before the task loss
    can object (docs/pruning.md has the measurement). It is also used if no weight moves a logit (masks.lr = 0). `meet_budget` removes
    what exceeds the budget when the masks become binary.

    Args:
        config: the masks' configuration.
        batches: number of batches that learn masks, over all epochs.
        layout: the full network's mask layout.
        device: where the logits lie.

    Attributes:
        value: λ_s, a scalar, float64 on `device`.
    """

    def __init__(self, config: MasksConfig, batches: int, layout: MaskLayout, device: torch.device) -> None:
        self.config, self.batches = config, batches
        self.value = torch.tensor(config.sparsity, dtype=torch.float64, device=device)
        self._remaining = torch.tensor(max(batches, 1), dtype=torch.float64, device=device)
        self._budget = None if config.target_params is None else Budget(layout, config, device)

    @property
    def weight(self) -> float:
        """λ_s as a number, read from the device."""
        return float(self.value)

    @weight.setter
    def weight(self, weight: float) -> None:
        self.value.fill_(weight)

    def set_batch(self, batch: int) -> None:
        """Set the number of the next batch (0-based, counted over all epochs that learn masks)."""
        self._remaining.fill_(max(self.batches - batch, 1))

    @torch.no_grad()
    def adapt(self, logits: Tensor) -> None:
        """Set λ_s for the next batch, from the mask logits (C,)."""
        if self._budget is None:
            return
        threshold = self._budget.threshold(logits).double().clamp(min=0)
        moved = self._remaining * self.config.lr * self._budget.pull(logits).clamp(min=1e-12)
        self.value.copy_((threshold / moved).clamp(max=self.config.sparsity).masked_fill(moved <= 0, self.config.sparsity))
