"""What a compiled kernel is made of, read from its machine code and from Triton's last representation before it. Needs no GPU.

The main loop is what runs again and again around the tensor-core instructions (in a kernel without any, around the block with most fused
multiply-adds): every instruction that reaches one of them and is reached by it. Counts are of instructions in the code, not of executions.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from der_fast.kernels import compile_case as names
from der_fast.kernels.compile_case import CompileCase
from der_fast.kernels.occupancy import resident_blocks

# The products of each generation; an older one's instruction on a newer GPU runs at a fraction of its speed.
PRODUCTS = {80: re.compile(r"HMMA\."), 90: re.compile(r"HGMMA\."), 100: re.compile(r"UTC[A-Z]*MMA")}
TENSOR = re.compile(r"(HMMA|HGMMA|UTC[A-Z]*MMA)\b")
WIDTH = re.compile(r"\.(?:[US]?(8|16|32|64|128|256))(?=\.|$)")

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")


@dataclass(frozen=True)
class Instruction:
    """One line of machine code: the predicate or '', the name with its suffixes, and the operands."""

    predicate: str
    name: str
    operands: str

    @property
    def bytes(self) -> int:
        """Bytes per thread of a memory access."""
        found = WIDTH.findall(self.name)
        return int(found[-1]) // 8 if found else 4

    @property
    def multiply_adds(self) -> int:
        """Fused multiply-adds of float32."""
        return {"FFMA": 1, "FFMA2": 2}.get(self.name.split(".")[0], 0)


@dataclass(frozen=True)
class MachineCode:
    """What one compiled kernel is made of.

    Attributes:
        name, capability: of the case; 80 for 8.0, and so on.
        registers: per thread.
        stack: bytes of local memory per thread: 0 unless registers spill.
        local: instructions that touch local memory.
        shared: bytes of shared memory per block.
        warps: per block.
        blocks: that a multiprocessor holds at a time.
        products: tensor-core instruction → count.
        multiply_adds: fused multiply-adds of float32 outside tensor cores.
        loads, copies, stores: bytes per thread → count, of global loads, of asynchronous copies to shared memory, and of global stores.
        bulk_copies, bulk_stores: of whole tiles by a descriptor.
        loop_loads, loop_copies: the same of the main loop alone.
        asked: of the IR's products of warp groups in loops, those that do not wait: (asynchronous, all).
        in_flight: products that may be under way at the strictest wait that every trip of the main loop passes; None where it has no such
            wait. A persistent kernel also waits for all of them, but only where a tile ends.
    """

    name: str
    capability: int
    registers: int
    stack: int
    local: int
    shared: int
    warps: int
    blocks: int
    products: Mapping[str, int]
    multiply_adds: int
    loads: Mapping[int, int]
    copies: Mapping[int, int]
    stores: Mapping[int, int]
    bulk_copies: int
    bulk_stores: int
    loop_loads: Mapping[int, int]
    loop_copies: Mapping[int, int]
    asked: tuple[int, int]
    in_flight: int | None


def read(case: CompileCase, capability: int, kernel: Any) -> MachineCode:
    """Return what a kernel that `ahead_of_time.compiled` returned is made of."""
    registers, stack, listing = _dumped(kernel.asm["cubin"])
    code, loop = parsed(listing)
    shared = int(kernel.metadata.shared)

    def widths(which: Iterable[Instruction], *kinds: str) -> dict[int, int]:
        found = Counter(line.bytes for line in which if line.name.split(".")[0] in kinds)
        return dict(sorted(found.items(), reverse=True))

    return MachineCode(
        name=case.name,
        capability=capability,
        registers=registers,
        stack=stack,
        local=sum(line.name.split(".")[0] in ("LDL", "STL") for line in code),
        shared=shared,
        warps=case.num_warps,
        blocks=resident_blocks(capability, registers, shared, case.num_warps, int(getattr(kernel.metadata, "tmem_size", 0) or 0)),
        products=dict(sorted(Counter(line.name for line in code if TENSOR.match(line.name)).items())),
        multiply_adds=sum(line.multiply_adds for line in code),
        loads=widths(code, "LDG"),
        copies=widths(code, "LDGSTS"),
        stores=widths(code, "STG"),
        bulk_copies=sum(line.name.startswith("UTMALDG") for line in code),
        bulk_stores=sum(line.name.startswith("UTMASTG") for line in code),
        loop_loads=widths(loop, "LDG"),
        loop_copies=widths(loop, "LDGSTS"),
        asked=asked_asynchronous(kernel.asm["ttgir"]),
        in_flight=strictest_wait(listing),
    )


def holds(what: str, code: MachineCode, case: CompileCase) -> bool:
    """Return whether something that a case can want is there.

    * tensor cores: the products of the GPU's own generation, and no older ones.
    * no scalar loop: a product without tensor cores is BLOCK_M·BLOCK_N·BLOCK_K multiply-adds per step, unrolled. What belongs around it
      are a few per element of the two operands and of the result: at most two are allowed, shared by the block's threads.
    * 16-byte loads and stores: accesses of 16 bytes or more suffice for a tile's activations and weights, loads those of the main loop
      where it has any; copies count as loads. What is known per channel or per image comes beside it, in accesses of any width.
    * asynchronous copies: there are some, and the main loop loads at most an eighth as many bytes past them.
    * asynchronous products in the IR, asynchronous products: no product of a warp group in a loop is waited for at once, as Triton asks
      for it and as the assembler made it, which puts waits in where it cannot prove that registers stay untouched. Only 9.0 has them.

    Raises:
        ValueError: nothing of that name can be wanted.
    """
    if what == names.TENSOR_CORES:
        return bool(code.products) and all(PRODUCTS[code.capability].match(name) for name in code.products)
    if what == names.NO_SCALAR_LOOP:
        return code.multiply_adds <= _around_products(case)
    if what == names.WIDE_LOADS:
        loop = (code.loop_loads, code.loop_copies)
        return code.bulk_copies > 0 or _wide(code, *(loop if any(loop) else (code.loads, code.copies))) >= case.tile_loads > 0
    if what == names.WIDE_STORES:
        return code.bulk_stores > 0 or _wide(code, code.stores) >= case.tile_stores > 0
    if what == names.COPIES:
        copied = _bytes(code.loop_copies)
        return code.bulk_copies > 0 or (copied > 0 and _bytes(code.loop_loads) * 8 <= copied)
    if what == names.ASKED_ASYNCHRONOUS:
        return code.capability != 90 or (code.asked[1] > 0 and code.asked[0] == code.asked[1])
    if what == names.ASYNCHRONOUS:
        return code.capability != 90 or bool(code.in_flight)
    if what == names.NO_LOCAL:
        return code.stack == 0 and code.local == 0
    if what == names.RESIDENT:
        return code.blocks >= case.resident
    raise ValueError(f"{case.name} wants {what!r}, which nothing here can judge")


def faults(code: MachineCode, case: CompileCase) -> list[str]:
    """Return where the code is not what its case declares: something wanted is missing, or something missing has come."""
    lacking = case.lacking(code.capability)
    found = [f"lacks {what!r} without wanting it" for what in lacking if what not in case.wanted]
    if code.stack > case.stack_budget:
        found.append(f"takes {code.stack} bytes of stack, more than its budget of {case.stack_budget}")
    for what in case.wanted:
        there = holds(what, code, case)
        if there and what in lacking:
            found.append(f"has {what!r} now, so it should not declare that it lacks it ({lacking[what]})")
        elif not there and what not in lacking:
            found.append(f"has not {what!r}")
    return found


def _around_products(case: CompileCase) -> int:
    m, n, k = (int(case.constants[f"BLOCK_{axis}"]) for axis in "MNK")
    return 2 * (m * k + n * k + m * n) // (32 * case.num_warps)


def _wide(code: MachineCode, *accesses: Mapping[int, int]) -> int:
    """Return how many bytes a block moves in accesses of 16 bytes or more."""
    return 32 * code.warps * sum(_bytes(found, 16) for found in accesses)


def _bytes(found: Mapping[int, int], least: int = 1) -> int:
    return sum(width * count for width, count in found.items() if width >= least)


@functools.cache
def _dumped(cubin: bytes) -> tuple[int, int, str]:
    """Registers and bytes of stack per thread, and the disassembly, by the tools that come with Triton."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

    def output(tool: str, option: str, path: str) -> str:
        return subprocess.run([str(tools / tool), option, path], check=True, capture_output=True, text=True, timeout=120).stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, listing = output("cuobjdump", "-res-usage", file.name), output("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage:\n{usage}")
    return int(found[1]), int(found[2]) + int(found[3]), listing


def parsed(listing: str) -> tuple[list[Instruction], list[Instruction]]:
    """Return all instructions of a disassembly, and those of its main loop."""
    code, labels = _instructions(listing)
    return code, [code[number] for number in sorted(_main_loop(code, labels))]


def strictest_wait(listing: str) -> int | None:
    """Return how many products may be under way at the strictest wait that every trip of the main loop passes; None without one."""
    code, labels = _instructions(listing)
    loop = _main_loop(code, labels)
    after, _ = _edges(code, labels)
    products = [number for number in loop if TENSOR.match(code[number].name)]
    found = []
    for wait in (number for number in loop if code[number].name.startswith("WARPGROUP.DEPBAR")):
        # Where a product can still come round without the wait, a trip can avoid it.
        rest = loop - {wait}
        if not any(product in _reached(product, after, rest) for product in products):
            found.append(int(code[wait].operands.rpartition("0x")[2], 16))
    return min(found, default=None)


def _instructions(listing: str) -> tuple[list[Instruction], dict[str, int]]:
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        label, found = _LABEL.match(line), _INSTRUCTION.match(line)
        if label:
            labels[label[1]] = len(code)
        elif found:
            code.append(Instruction(found[1] or "", found[2], found[3]))
    if not code:
        raise RuntimeError(f"nvdisasm printed no code:\n{listing[:2000]}")
    return code, labels


def _edges(code: list[Instruction], labels: Mapping[str, int]) -> tuple[list[list[int]], list[list[int]]]:
    """Return what may follow each instruction, and what may precede it."""
    after: list[list[int]] = [[] for _ in code]
    before: list[list[int]] = [[] for _ in code]
    for number, line in enumerate(code):
        kind = line.name.split(".")[0]
        target = _TARGET.search(line.operands) if kind == "BRA" else None
        conditional = bool(line.predicate) or (kind == "BRA" and re.match(r"!?U?P\d", line.operands) is not None)
        following = [labels[target[1]]] if target else []
        if number + 1 < len(code) and (conditional or kind not in ("BRA", "EXIT", "RET")):
            following.append(number + 1)
        after[number] = [place for place in following if place < len(code)]
        for place in after[number]:
            before[place].append(number)
    return after, before


def _main_loop(code: list[Instruction], labels: Mapping[str, int]) -> set[int]:
    after, before = _edges(code, labels)
    # Every loop has a step backward.
    heads = {place for number, places in enumerate(after) for place in places if place <= number}
    loops = [_reached(head, after) & _reached(head, before) for head in sorted(heads)]
    tensor = any(TENSOR.match(line.name) for line in code)

    def weight(loop: set[int]) -> int:
        return sum(bool(TENSOR.match(code[number].name)) if tensor else code[number].multiply_adds for number in loop)

    found = max(loops, key=weight, default=set())
    return found if weight(found) else set()


def _reached(start: int, edges: list[list[int]], within: set[int] | None = None) -> set[int]:
    """Return what is reached from an instruction by at least one step, on a way that does not leave `within`."""
    found: set[int] = set()
    waiting = list(edges[start])
    while waiting:
        place = waiting.pop()
        if place not in found and (within is None or place in within):
            found.add(place)
            waiting.extend(edges[place])
    return found


def asked_asynchronous(ttgir: str) -> tuple[int, int]:
    """Return of the products of warp groups inside loops how many run on while the program goes on, and how many there are."""
    asynchronous = count = 0
    depth: list[int] = []
    # A wait in a branch belongs to the end of a tile, which few of the trips reach.
    branch: int | None = None
    waited = False
    for line in ttgir.splitlines():
        indent = len(line) - len(line.lstrip())
        closes = line.lstrip().startswith("}") and "do {" not in line
        if branch is not None and indent == branch and closes:
            branch = branch if "else {" in line else None
        elif depth and indent == depth[-1] and closes:
            depth.pop()
        elif re.search(r"\bscf\.(for|while)\b", line):
            depth.append(indent)
        elif depth and branch is None and re.search(r"\bscf\.if\b", line):
            branch = indent
        elif depth and branch is None and "ttng.warp_group_dot_wait" in line:
            waited |= "pendings = 0" in line
        elif depth and "ttng.warp_group_dot " in line:
            count += 1
            asynchronous += "isAsync = true" in line
    return (0 if waited else asynchronous), count
