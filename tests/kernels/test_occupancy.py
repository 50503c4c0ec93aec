"""How many blocks fit on a multiprocessor, against counts worked out by hand."""

from __future__ import annotations

import pytest

from der_fast.kernels.occupancy import resident_blocks


@pytest.mark.parametrize(
    ("capability", "registers", "shared", "warps", "tensor_memory", "blocks"),
    [
        # 64 warps are the most of a multiprocessor, 32 blocks too.
        (90, 32, 0, 8, 0, 8),
        (90, 16, 0, 1, 0, 16),
        (90, 16, 0, 2, 0, 16),
        # 16384 registers per quarter, whose share is one warp of four, two of eight.
        (80, 255, 0, 4, 0, 2),
        (80, 168, 0, 8, 0, 1),
        (80, 128, 0, 8, 0, 2),
        # 97 are given out as 104: 16384 // 3328 = 4 warps; 96: 5.
        (80, 97, 0, 4, 0, 4),
        (80, 96, 0, 4, 0, 5),
        # The driver's own kibibyte comes on top: two blocks of 82 KiB would fill 164, of 81 they fit.
        (80, 32, 82 * 1024, 4, 0, 1),
        (80, 32, 81 * 1024, 4, 0, 2),
        (90, 32, 98304, 4, 0, 2),
        (80, 32, 98304, 4, 0, 1),
        # More than any block may have.
        (80, 32, 164 * 1024, 4, 0, 0),
        (90, 32, 164 * 1024, 4, 0, 1),
        # Tensor memory has 512 columns.
        (100, 32, 0, 4, 256, 2),
        (100, 32, 0, 4, 512, 1),
    ],
)
def test_blocks_that_fit(capability, registers, shared, warps, tensor_memory, blocks):
    assert resident_blocks(capability, registers, shared, warps, tensor_memory) == blocks
