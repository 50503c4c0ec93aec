"""The machine code of the kernels is what their cases declare: here a part of them, all of them by `python -m bench machine-code`."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from der_fast.errors import BackendError
from der_fast.kernels import ahead_of_time, machine_code, triton_runtime
from der_fast.kernels import compile_case as names
from der_fast.kernels.compile_case import CAPABILITIES, CompileCase, Lack

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "bench" / "results" / "machine-code.jsonl"
# Every kernel once, and every generation's products.
EVERY = ("conv.*.bf16.64x64.chain", "conv.wgrad.sum.*", "grouped_conv.3x3.bf16.residual", "masked_bn.*bf16.64", "masked_bn.*s.64")
EVERY += ("masked_bn.finalize.64", "augment.*.bf16", "channel_masks.*.fp32", "conv.dgrad.bf16.64x64.join")
# On one of them also what differs by width and by type.
MORE = ("conv.*.bf16.3x64.chain", "conv.*.bf16.256x256", "conv.*.bf16.37x37.chain", "conv.*.bf16.40x40.chain", "conv.*.fp16.64x64.chain")
MORE += ("grouped_conv.stem.bf16", "grouped_conv.3x3.bf16.pool", "grouped_conv.1x1.bf16.*", "grouped_conv.3x3.fp32.widen")
MORE += ("masked_bn.*bf16.37", "masked_bn.backward_reduce.*.bf16.512", "augment.*.fp32", "channel_masks.*.fp64")
# What may differ from Triton's version of the committed table to another.
OF_THE_COMPILER = (names.ASYNCHRONOUS, names.NO_LOCAL, names.RESIDENT, "bytes of stack")
PARTS = {**{f"{capability}": (capability, EVERY) for capability in CAPABILITIES}, "90, more": (90, MORE)}
# Only 9.0 launches these.
PARTS["90"] = (90, (*EVERY, "conv.descriptor.*.bf16.64x64", "conv.descriptor.*.sum"))


def compiled(path: Path, capability: int, *patterns: str) -> list[dict]:
    # A process of its own: this one interprets its kernels.
    command = [sys.executable, "-m", "bench", "machine-code", *patterns, "--arch", str(capability), "--json", str(path), "--jobs", "2"]
    environment = {name: value for name, value in os.environ.items() if name != triton_runtime.INTERPRET}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode in (0, 1), f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def kernels(capability: int) -> set[str]:
    """Every kernel but those that the GPU does not launch."""
    elsewhere = "triton_descriptor" if capability != 90 else "nothing"
    modules = [importlib.import_module(name) for name in ahead_of_time.modules() if not name.endswith(elsewhere)]
    return {
        name
        for module in modules
        for name, value in vars(module).items()
        if name.endswith("_kernel") and hasattr(value, "arg_names") and value.fn.__module__ == module.__name__
    }


@pytest.mark.parametrize("part", PARTS)
def test_every_kernel_is_made_of_what_its_case_declares(part, tmp_path):
    capability, patterns = PARTS[part]
    rows = compiled(tmp_path / "rows.jsonl", capability, *patterns)
    table = {(row["name"], row["capability"]): row for row in map(json.loads, TABLE.read_text(encoding="utf-8").splitlines())}
    faults = [(row["name"], fault) for row in rows for fault in row["faults"]]
    if any(row["triton"] != table[row["name"], capability]["triton"] for row in rows):
        # Registers are given out differently by every version of the compiler; what is asked of it is not.
        faults = [(name, fault) for name, fault in faults if not any(what in fault for what in OF_THE_COMPILER)]
    assert faults == []
    # Each pattern finds something, and the first ones leave no kernel out.
    assert all(any(fnmatchcase(row["name"], pattern) for row in rows) for pattern in patterns)
    assert patterns is MORE or {row["kernel"] for row in rows} == kernels(capability)
    # The table that is committed says the same of them.
    for row in rows:
        stated = table[row["name"], capability]
        assert (stated["wants"], stated["lacks"], stated["faults"]) == (row["wants"], row["lacks"], []), row["name"]


def test_interpreted_kernels_are_not_compiled(monkeypatch):
    monkeypatch.setattr(triton_runtime, "interpreting", lambda: True)
    with pytest.raises(BackendError, match="TRITON_INTERPRET is set"):
        ahead_of_time.cases()


# What nvdisasm prints of a loop: a step before it, a wait that a far branch comes back from, and an epilogue.
LISTING = """
.text.kernel:
        /*0000*/                   LDG.E.64 R2, desc[UR4][R4.64] ;
        /*0010*/              @!P0 BRA `(.L_x_2) ;
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
.L_x_0:
        /*0030*/                   LDGSTS.E.BYPASS.128 [R7], desc[UR4][R8.64] ;
        /*0040*/              @!P5 BRA `(.L_x_3) ;
.L_x_1:
        /*0050*/                   LDG.E.U16.CONSTANT R2, desc[UR4][R4.64] ;
        /*0060*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0070*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0080*/               @P1 BRA `(.L_x_0) ;
.L_x_2:
        /*0090*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*00a0*/                   FFMA R1, R2, R3, R4 ;
        /*00b0*/                   FFMA2 R1, R2.F32x2.HI_LO, R3.F32x2.HI_LO, R4.F32x2.HI_LO ;
        /*00c0*/                   LDG.E R2, desc[UR4][R4.64] ;
        /*00d0*/                   STG.E.128 desc[UR4][R4.64], R4 ;
        /*00e0*/                   STL.64 [R1], R4 ;
        /*00f0*/                   EXIT ;
.L_x_3:
        /*0100*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P5, [UR19], R20 ;
        /*0110*/                   BRA `(.L_x_1) ;
.L_x_4:
        /*0120*/                   BRA `(.L_x_4);
"""


def test_the_main_loop_is_what_runs_around_the_products():
    code, loop = machine_code.parsed(LISTING)
    assert len(code) == 19
    assert [line.name for line in loop] == [
        "LDGSTS.E.BYPASS.128",
        "BRA",
        "LDG.E.U16.CONSTANT",
        "HGMMA.64x64x16.F32.BF16",
        "WARPGROUP.DEPBAR.LE",
        "BRA",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT",
        "BRA",
    ]
    assert [line.bytes for line in code if line.name.startswith(("LD", "ST"))] == [8, 16, 2, 4, 16, 8]
    assert sum(line.multiply_adds for line in code) == 3


# A persistent loop: every trip passes the first wait, and only those where a tile ends the second.
PERSISTENT = """
.L_x_0:
        /*0000*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0010*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0020*/               @P0 BRA `(.L_x_1) ;
        /*0030*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0040*/                   UTMASTG.4D [UR8], [UR6] ;
.L_x_1:
        /*0050*/               @P1 BRA `(.L_x_0) ;
        /*0060*/                   EXIT ;
"""


@pytest.mark.parametrize(
    ("listing", "products"),
    [
        (LISTING, 1),
        (PERSISTENT, 1),
        (PERSISTENT.replace("gsb0, 0x1", "gsb0, 0x0"), 0),
        (PERSISTENT.replace("               @P0 BRA `(.L_x_1) ;", "                   NOP ;"), 0),
        (PERSISTENT.replace("WARPGROUP.DEPBAR.LE gsb0, 0x1", "NOP"), None),
    ],
)
def test_the_strictest_wait_is_one_that_every_trip_passes(listing, products):
    assert machine_code.strictest_wait(listing) == products


IR = """
    %0 = scf.for %i = %a to %b step %c iter_args(%acc = %cst) -> (tensor<128x64xf32, #mma>)  : i32 {
      %1 = ttng.warp_group_dot %x, %y, %acc {isAsync = true} : tensor
      %2:3 = ttng.warp_group_dot_wait %1, %x, %y {pendings = 1 : i32} : tensor
      scf.yield %2#0 : tensor
    }
    %3 = ttng.warp_group_dot_wait %0#0 {pendings = 0 : i32} : tensor
"""
# A tile ends in a branch of the loop.
BRANCH = """      scf.if %done {
        %4:3 = ttng.warp_group_dot_wait %2#0, %x, %y {pendings = 0 : i32} : tensor
      } else {
        %5:3 = ttng.warp_group_dot_wait %2#0, %x, %y {pendings = 0 : i32} : tensor
      }
"""
WAIT = "      %6:3 = ttng.warp_group_dot_wait %2#0, %x, %y {pendings = 0 : i32} : tensor\n"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (IR, (1, 1)),
        (IR.replace("{isAsync = true}", "{isAsync = false}"), (0, 1)),
        (IR.replace("pendings = 1", "pendings = 0"), (0, 1)),
        (IR.replace("      scf.yield", f"{BRANCH}      scf.yield"), (1, 1)),
        (IR.replace("      scf.yield", f"{BRANCH}{WAIT}      scf.yield"), (0, 1)),
        ("    %1 = tt.dot %a, %b, %c : tensor", (0, 0)),
    ],
)
def test_what_the_ir_asks_for(text, found):
    assert machine_code.asked_asynchronous(text) == found


CASE = CompileCase(
    name="some",
    kernel=None,
    signature={},
    constants={"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32},
    num_warps=4,
    resident=2,
    tile_loads=2 * 32 * (128 + 64),
    tile_stores=2 * 128 * 64,
)
GOOD = machine_code.MachineCode(
    name="some",
    capability=90,
    registers=100,
    stack=0,
    local=0,
    shared=0,
    warps=4,
    blocks=2,
    products={"HGMMA.64x64x16.F32.BF16": 2},
    # Twice (128·32 + 64·32 + 128·64) / 128 threads.
    multiply_adds=224,
    loads={4: 6},
    copies={16: 6},
    stores={16: 8, 4: 3},
    bulk_copies=0,
    bulk_stores=0,
    loop_loads={4: 3},
    loop_copies={16: 6},
    asked=(1, 1),
    in_flight=1,
)


@pytest.mark.parametrize(
    ("what", "worse"),
    [
        (names.TENSOR_CORES, {"products": {}}),
        (names.TENSOR_CORES, {"products": {"HMMA.16816.F32.BF16": 16}}),
        (names.TENSOR_CORES, {"capability": 100}),
        (names.NO_SCALAR_LOOP, {"multiply_adds": 225}),
        (names.WIDE_LOADS, {"loop_copies": {16: 5, 8: 2}}),
        (names.WIDE_LOADS, {"loop_loads": {}, "loop_copies": {}, "copies": {16: 5}}),
        (names.WIDE_STORES, {"stores": {16: 7, 8: 2}}),
        (names.COPIES, {"loop_loads": {4: 3, 2: 1}}),
        (names.COPIES, {"loop_loads": {}, "loop_copies": {}}),
        (names.ASKED_ASYNCHRONOUS, {"asked": (0, 1)}),
        (names.ASKED_ASYNCHRONOUS, {"asked": (0, 0)}),
        (names.ASYNCHRONOUS, {"in_flight": 0}),
        (names.ASYNCHRONOUS, {"in_flight": None}),
        (names.NO_LOCAL, {"stack": 8}),
        (names.NO_LOCAL, {"local": 1}),
        (names.RESIDENT, {"blocks": 1}),
    ],
)
def test_what_is_wanted_must_be_there_and_what_is_lacking_must_not(what, worse):
    assert machine_code.holds(what, GOOD, CASE)
    bad = replace(GOOD, **worse)
    case = replace(CASE, wants=(what,))
    assert machine_code.faults(GOOD, case) == []
    assert f"has not {what!r}" in machine_code.faults(bad, case)
    known = replace(case, lacks=(Lack(what, "nobody wrote it yet", (bad.capability,)),))
    assert f"has not {what!r}" not in machine_code.faults(bad, known)
    assert any("nobody wrote it yet" in fault for fault in machine_code.faults(replace(GOOD, capability=90), known)) == (
        bad.capability == 90
    )


def test_a_known_spill_stays_within_its_budget():
    case = replace(CASE, stack_budget=8, lacks=(Lack(names.NO_LOCAL, "registers spill"),))
    assert machine_code.faults(replace(GOOD, stack=8, local=2), case) == []
    assert machine_code.faults(replace(GOOD, stack=16, local=2), case) == ["takes 16 bytes of stack, more than its budget of 8"]


def test_a_descriptor_counts_as_copies_and_as_wide():
    bulk = replace(GOOD, copies={}, loop_copies={}, stores={}, bulk_copies=2)
    assert machine_code.holds(names.COPIES, bulk, CASE) and machine_code.holds(names.WIDE_LOADS, bulk, CASE)
    assert machine_code.holds(names.WIDE_STORES, replace(bulk, bulk_stores=1), CASE)
    assert not machine_code.holds(names.WIDE_STORES, bulk, CASE)


def test_older_gpus_have_no_asynchronous_products():
    assert machine_code.holds(names.ASYNCHRONOUS, replace(GOOD, capability=80, in_flight=None), CASE)


def test_what_nobody_can_judge_is_refused():
    with pytest.raises(ValueError, match="wants 'speed'"):
        machine_code.faults(GOOD, replace(CASE, wants=("speed",)))
    assert machine_code.faults(GOOD, replace(CASE, lacks=(Lack(names.COPIES, "why not"),))) == [
        "lacks 'asynchronous copies' without wanting it"
    ]
