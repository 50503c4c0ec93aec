"""How many blocks of a kernel a multiprocessor holds at a time (CUDA C++ Programming Guide, "Compute Capabilities")."""

from __future__ import annotations

from dataclasses import dataclass

# Alike from 8.0 to 10.0: registers are given out to each of the four quarters of a multiprocessor, for whole warps, in units.
REGISTERS_PER_QUARTER, QUARTERS, REGISTER_UNIT = 16384, 4, 256
BLOCKS, WARPS = 32, 64
# The driver keeps some of a block's shared memory for itself, and gives it out in units.
RESERVED, SHARED_UNIT = 1024, 128
# Columns of a Blackwell multiprocessor's tensor memory.
TENSOR_MEMORY = 512


@dataclass(frozen=True)
class Limits:
    """Bytes of shared memory: of a multiprocessor, and the most of one block."""

    shared: int
    block: int


LIMITS = {80: Limits(164 * 1024, 163 * 1024), 90: Limits(228 * 1024, 227 * 1024), 100: Limits(228 * 1024, 227 * 1024)}


def resident_blocks(capability: int, registers: int, shared: int, warps: int, tensor_memory: int = 0) -> int:
    """Return the blocks that fit on one multiprocessor; 0 where not even one does.

    Args:
        capability: 80, 90 or 100.
        registers: per thread.
        shared: bytes per block.
        warps: per block, of 32 threads.
        tensor_memory: columns per block.
    """
    limits = LIMITS[capability]
    if shared > limits.block or registers > 255:
        return 0
    per_warp = -(-max(registers, 1) * 32 // REGISTER_UNIT) * REGISTER_UNIT
    # A block's warps are dealt out to the quarters.
    in_quarter = -(-warps // QUARTERS)
    by_registers = REGISTERS_PER_QUARTER // per_warp // in_quarter
    by_shared = limits.shared // (-(-(shared + RESERVED) // SHARED_UNIT) * SHARED_UNIT)
    by_tensor_memory = TENSOR_MEMORY // tensor_memory if tensor_memory else BLOCKS
    return min(BLOCKS, WARPS // (in_quarter * QUARTERS), by_registers, by_shared, by_tensor_memory)
