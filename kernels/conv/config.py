"""How a convolution is cut into tiles: a default from its shape, and the candidates that are worth timing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """Tile and launch parameters of one kernel; every number but stages and group a power of two.

    The GEMM behind it: forward has rows N·H'·W', columns K and reduces over taps × C; dgrad has rows N·H·W, columns C and reduces over
    taps × K; wgrad has rows K, columns taps × C and reduces over N·H'·W'.

    Attributes:
        block_m, block_n, block_k: rows, columns and reduction of one step, each at least 16.
        num_warps, num_stages: of the launch.
        group: neighbouring programs share columns within this many blocks of rows.
        flat: taps × channels are cut as one index, so that a tile may span taps; otherwise each tap is cut on its own.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 3
    group: int = 8
    flat: bool = False
