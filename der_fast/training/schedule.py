"""Learning rate and mask scale as functions of epoch and batch."""

from __future__ import annotations

from der_fast.config.schema import ScheduleConfig


def learning_rate(config: ScheduleConfig, epoch: int) -> float:
    """Return the learning rate of an epoch (0-based): linear warm-up, then × gamma at every milestone passed.

    The warm-up rises from `warmup_lr` in its first epoch to `lr`, which applies from epoch `warmup_epochs` on. Milestones are
    counted from the start of the stage, warm-up included.
    """
    if epoch < config.warmup_epochs:
        return config.warmup_lr + (config.lr - config.warmup_lr) * epoch / config.warmup_epochs
    return float(config.lr * config.gamma ** sum(epoch >= milestone for milestone in config.milestones))


def mask_scale(batch: int, batches: int, s_max: float) -> float:
    """Return s for batch b = 1…B of an epoch: from 1/s_max to s_max linearly; s_max if B = 1 (eq. 6)."""
    if batches == 1:
        return s_max
    return 1 / s_max + (s_max - 1 / s_max) * (batch - 1) / (batches - 1)


def settled_from(epochs: int, share: float) -> int:
    """Return the first epoch (0-based) of the settled part: the last `share` of the epochs; `epochs` if there is none.

    At least one epoch learns the masks.
    """
    return max(epochs - round(share * epochs), min(1, epochs))
