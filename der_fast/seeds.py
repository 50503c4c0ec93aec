"""Random seeds derived from names, so that no random state has to be stored.

Every random decision (shuffling, augmentation, initialisation) takes its generator from `generator(seed, "what", step, epoch, ...)`. A
resumed run therefore draws exactly the numbers that it would have drawn without the interruption. Results computed from them repeat bit for
bit only on the same kind of processor (docs/cpu.md). Only the class order follows the field's own convention
(`training/orders.py`).
"""

from __future__ import annotations

import hashlib

import torch


def derive_seed(seed: int, *names: str | int) -> int:
    """Return a 63-bit seed that depends on `seed` and on every name.

    Args:
        seed: the run's seed.
        names: what the random numbers are for, e.g. ``("augment", step, epoch)``.
    """
    text = "\x1f".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *names: str | int) -> torch.Generator:
    """Return a CPU generator seeded with `derive_seed(seed, *names)`."""
    return torch.Generator().manual_seed(derive_seed(seed, *names))
