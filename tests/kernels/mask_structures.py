"""Networks as the sparsity loss sees them, for the tests of `masks_and_sparsity`."""

from __future__ import annotations

import pytest
import torch

from der_fast.kernels.channel_masks import ConvolutionGroups, MaskStructure

STRUCTURES = {
    "one channel": ([1], [ConvolutionGroups((), (0,), 3, 9)]),
    "odd": (
        [2, 3, 1, 17],
        [
            ConvolutionGroups((), (0,), 3, 9),
            ConvolutionGroups((0,), (1,), 0, 9),
            ConvolutionGroups((0, 1), (2,), 0, 1),
            ConvolutionGroups((2,), (0, 3), 0, 9),
            ConvolutionGroups((3,), (1,), 0, 25),
            ConvolutionGroups((3,), (3,), 0, 1),
        ],
    ),
    # Rows of 128: below, at and above one, and several; a group that nothing uses, and one without channels.
    "rows": (
        [64, 128, 130, 513, 5, 0],
        [ConvolutionGroups((), (0,), 3, 49), *(ConvolutionGroups((g,), (h,), 0, 9) for g in range(4) for h in (0, 1, 2, 3, 5))],
    ),
    # Every convolution uses the first group: more users than a program sums at a time.
    "many": ([16] * 5, [ConvolutionGroups((g % 5,), (0,), 0, 1 + g % 3) for g in range(150)]),
}


def structure_of(name, device="cpu"):
    return MaskStructure.of(*STRUCTURES[name], device=device)


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that was not written holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)
