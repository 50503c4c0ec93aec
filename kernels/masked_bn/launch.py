"""Cuts the passes into programs: every block size is chosen here, from the shape alone.

Channels-last rows are contiguous, so r of them can be read as one row of r·C columns, where column j belongs to channel j mod C. `view`
picks r so that columns come in multiples of 64 where the shape allows it: then one, three or seventeen channels are also read in full
vectors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# Rows are folded to a multiple of this, which is also the widest block of columns.
COLUMNS, WIDEST = 64, 128
# Folding more channels than this would gain little, and could push offsets inside a tile beyond 2³¹.
MOST_FOLDED_CHANNELS = 4096


@dataclass(frozen=True)
class View:
    """Activations of M rows of C, read as `rows` rows of `width` columns; each holds `fold` of the M rows."""

    rows: int
    width: int
    fold: int


@dataclass(frozen=True)
class Launch:
    """How a pass over the activations is cut.

    Attributes:
        block_rows, block_columns: the tile that a program holds at a time; powers of two, at least 16, at most 256.
        tiles: how many tiles, one below another, a program works through.
        num_warps: warps of 32 threads per program.
    """

    block_rows: int
    block_columns: int
    tiles: int
    num_warps: int = 4


def view(rows: int, channels: int, foldable: bool = True) -> View:
    """Return how (M, C) is read; without `foldable`, row by row."""
    wanted = COLUMNS // math.gcd(channels, COLUMNS) if foldable and channels <= MOST_FOLDED_CHANNELS else 1
    fold = math.gcd(rows, wanted)
    return View(rows // fold, channels * fold, fold)


def grid(shape: View, cut: Launch) -> tuple[int, int]:
    """Return the number of programs down the rows and across the columns."""
    return -(-shape.rows // (cut.block_rows * cut.tiles)), -(-shape.width // cut.block_columns)


def _columns(width: int) -> int:
    return WIDEST if width % WIDEST == 0 else min(COLUMNS, max(16, 1 << (width - 1).bit_length()))


def elementwise(shape: View, processors: int) -> Launch:
    """Return the launch of a pass that writes one element for each that it reads."""
    columns = _columns(shape.width)
    # 32 elements per thread: in bfloat16, four vectors of 16 bytes in flight per operand.
    block = 4096 // columns
    tiles = -(-shape.rows // block) * -(-shape.width // columns)
    # Several tiles share the loads of per-channel values, as long as every multiprocessor still gets many programs.
    return Launch(block, columns, min(4, max(1, tiles // (32 * processors))))


def reduction(shape: View, processors: int, resident: int) -> Launch:
    """Return the launch of a pass that sums over rows, with `resident` programs per multiprocessor, the number that run at a time.

    More would wait for the first to end; fewer would leave too few loads in flight.
    """
    columns = _columns(shape.width)
    # 16 elements per thread, since each has two or three running sums.
    block = 2048 // columns
    programs = max(1, processors * resident // -(-shape.width // columns))
    return Launch(block, columns, max(1, -(-shape.rows // (programs * block))))
