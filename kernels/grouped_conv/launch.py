"""How the fused kernel is launched: tile sizes as a function of the shapes; nothing is measured."""

from __future__ import annotations

from dataclasses import dataclass

from der_fast.kernels.device import H100_MULTIPROCESSORS
from der_fast.kernels.grouped_conv.layer import ALIGN, GroupedLayer


@dataclass(frozen=True)
class GroupedTiles:
    """One launch.

    Attributes:
        block_m: output pixels of a tile; a power of two ≥ 16.
        block_n: output channels of a tile; a power of two ≥ 16.
        block_k: products summed between two synchronisations; a power of two ≥ 16.
        num_warps, num_stages: Triton's launch options.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 3

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n", "block_k"):
            value = getattr(self, name)
            if value < 16 or value & (value - 1):
                raise ValueError(f"{name} must be a power of two of at least 16, not {value}")


def tile_channels(layer: GroupedLayer) -> int:
    """Return the number of output channels in a tile that wastes the least.

    A tile's time is that of its `block_n` columns plus that of loading its rows, which costs about as much as 32 columns. The result does
    not depend on the batch, so no table is made after the first run.
    """

    def cost(block_n: int) -> int:
        return sum(-(-entry.outputs // block_n) * max(entry.inputs, 1) for entry in layer.entries) * (block_n + 32)

    # Without tensor cores the operands of a float32 tile live in registers, and a wider tile needs more than there are.
    return min((128, 64, 32, 16) if layer.weights.dtype.itemsize == 2 else (64, 32, 16), key=cost)


def default_config(layer: GroupedLayer, pixels: int, processors: int = H100_MULTIPROCESSORS) -> GroupedTiles:
    """Return the launch for a result of `pixels` pixels, images × height × width.

    Args:
        layer: the layer to run.
        pixels: rows of the matrix product.
        processors: multiprocessors of the device.
    """
    block_n = tile_channels(layer)
    columns = sum(-(-entry.outputs // block_n) for entry in layer.entries)
    # With fewer than two tiles per multiprocessor, tiles of half the size leave fewer multiprocessors idle.
    block_m = 128 if columns * -(-pixels // 128) >= 2 * processors else 64
    # An image's channels are loaded one by one, each with its own address, which takes registers, as float32 does.
    light = layer.weights.dtype.itemsize == 2 and layer.align == ALIGN
    num_warps = 8 if block_m * block_n >= 128 * (64 if light else 32) else 4
    return GroupedTiles(block_m, block_n, 64 if light else 32, num_warps)
