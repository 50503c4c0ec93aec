"""How the passes are cut into programs: every choice of block size is made here, from the shape alone.

Channels-last rows are contiguous, so r of them can be read as one row of r·C columns, column j belonging to channel j mod C. `fold` picks r
so that columns come in multiples of 64 where the shape allows it: then one, three or seventeen channels are read with full vectors too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# What rows are folded to a multiple of, and the narrowest block of columns.
COLUMNS = 64
# Enough programs of 4 warps for every multiprocessor of an H100 (132) to hold 8.
PROGRAMS = 1056


@dataclass(frozen=True)
class Launch:
    """How a pass over the activations is cut.

    Attributes:
        block_rows, block_columns: the tile that a program holds at a time; powers of two.
        tiles: how many tiles, one below the other, a program works through.
        num_warps: of 32 threads per program.
    """

    block_rows: int
    block_columns: int
    tiles: int
    num_warps: int = 4


def fold(rows: int, channels: int, foldable: bool = True) -> int:
    """Return how many of M rows are read as one: a power of two that divides M, as large as it helps."""
    wanted = COLUMNS // math.gcd(channels, COLUMNS) if foldable else 1
    return math.gcd(rows, wanted)


def _columns(width: int) -> int:
    if width % 128 == 0:
        return 128
    return min(COLUMNS, max(16, 1 << (width - 1).bit_length()))


def elementwise(rows: int, width: int) -> Launch:
    """Return the launch of a pass that writes one element for each that it reads: (rows, width) after folding."""
    columns = _columns(width)
    # 32 elements per thread: four vectors of 16 bytes of bfloat16 under way per operand.
    return Launch(max(16, 4096 // columns), columns, 1)


def reduction(rows: int, width: int) -> Launch:
    """Return the launch of a pass that sums over rows: few enough partial sums, enough programs to fill the GPU."""
    columns = _columns(width)
    block = max(16, 2048 // columns)
    programs = max(1, PROGRAMS // -(-width // columns))
    return Launch(block, columns, max(1, -(-rows // (programs * block))))
