"""The recorder of `recording.py` finds what is planted: races between programs and within one, dependence on order, what is left out."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from der_fast.kernels import triton_runtime

pytestmark = pytest.mark.skipif(not triton_runtime.interpreting(), reason="programs are recorded by Triton's interpreter")

RECORDING = runpy.run_path(str(Path(__file__).with_name("recording.py")))
disturbed, recorded = RECORDING["disturbed"], RECORDING["recorded"]
BLOCK, COUNT = 8, 21
PROGRAMS = -(-COUNT // BLOCK)


@triton.jit
def double(x, out, count, SHIFT: tl.constexpr, REACH: tl.constexpr, BLOCK: tl.constexpr):
    """out = 2·x; a program begins SHIFT elements early, and the last one ends REACH elements late."""
    place = tl.program_id(0) * BLOCK - SHIFT + tl.arange(0, 2 * BLOCK)
    mine = (place >= 0) & (place < tl.minimum(tl.program_id(0) * BLOCK + BLOCK, count + REACH))
    tl.store(out + place, tl.load(x + place, mask=mine, other=0.0) * 2 + tl.program_id(0), mask=mine)


@triton.jit
def carry(out, STEP: tl.constexpr):
    """Each program adds 1 to what its neighbour left."""
    program = tl.program_id(0)
    before = tl.load(out + program)
    tl.store(out + program + STEP, before + 1)


@triton.jit
def last(out):
    tl.store(out, tl.program_id(0).to(tl.float32))


@triton.jit
def collect(x, out, EXPECTED: tl.constexpr, PLACE: tl.constexpr):
    if EXPECTED:
        tl.atomic_cas(out + PLACE, 0, 1)
    else:
        tl.atomic_add(out + PLACE, tl.load(x + tl.program_id(0)))


@triton.jit
def two_stages(x, work, out, WAIT: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(work + place, tl.load(x + place))
    if WAIT:
        tl.debug_barrier()
    tl.store(out + place, tl.load(work + tl.program_id(0) * BLOCK + BLOCK - 1 - tl.arange(0, BLOCK)))


@triton.jit
def halved(out, BLOCK: tl.constexpr):
    tl.store(out + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK) // 2, tl.arange(0, BLOCK).to(tl.float32))


@triton.jit
def every_second(out, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + 2 * place, place.to(tl.float32))


@triton.jit
def numbered(out, count):
    """Each program notes how many began before it."""
    before = tl.load(count)
    tl.store(out + tl.program_id(1), before)
    tl.store(count, before + 1)


@triton.jit
def copied_by_descriptor(x, out, rows, EARLY: tl.constexpr, MADE: tl.constexpr):
    if MADE:
        x = tl.make_tensor_descriptor(x, [rows, 16], [16, 1], [4, 16])
        out = tl.make_tensor_descriptor(out, [rows, 16], [16, 1], [4, 16])
    row = tl.program_id(0) * (4 - EARLY)
    out.store([row, 0], x.load([row, 0]))


def numbers(count=COUNT):
    return torch.arange(1.0, count + 1)


def doubled(shift=0, reach=0, length=COUNT, written=COUNT):
    def run():
        x, out = numbers(length), torch.empty(length)
        double[(PROGRAMS,)](x, out, written, SHIFT=shift, REACH=reach, BLOCK=BLOCK)
        return [out]

    return run


def wrong_with(run, kernel, *meant):
    """What is wrong, without the kernel's name in front."""
    launches, wrong = disturbed(run, meant=[f"{__name__}.{name}" for name in meant])
    assert [launch.kernel for launch in launches] == [f"{__name__}.{kernel}"]
    return [text.removeprefix(f"{__name__}.{kernel}: ") for text in wrong]


def test_nothing_is_wrong_where_programs_keep_to_themselves():
    launches, wrong = disturbed(doubled())
    assert not wrong and [launch.programs for launch in launches] == [PROGRAMS]


def test_two_programs_that_write_the_same_element():
    wrong = wrong_with(doubled(shift=1), "double")
    assert wrong == ["programs (0, 0, 0) and (1, 0, 0) both write out[7]", "result 0 depends on the order of programs"]
    # Declared as meant, it still must not show in the result.
    assert wrong_with(doubled(shift=1), "double", "double") == ["result 0 depends on the order of programs"]


@pytest.mark.parametrize("step", [1, -1])
def test_a_program_that_reads_what_another_writes(step):
    def run():
        out = torch.zeros(PROGRAMS + 2)
        carry[(PROGRAMS,)](out[1:], STEP=step)
        return [out]

    # Whether the written or the read element comes first; one lies before the argument, and is not touched.
    found = (
        "program (1, 0, 0) reads out[1], which (0, 0, 0) writes" if step > 0 else "program (0, 0, 0) reads out[0], which (1, 0, 0) writes"
    )
    assert found in wrong_with(run, "carry")
    if step > 0:
        assert "result 0 depends on the order of programs" in wrong_with(run, "carry")


def test_the_last_of_several_programs_on_three_axes():
    def run():
        out = torch.empty(1)
        last[(1, 2, 3)](out)
        return [out]

    assert wrong_with(run, "last")[0] == "programs (0, 0, 0) and (0, 1, 2) both write out[0]"


@pytest.mark.parametrize("expected", [True, False])
def test_atomic_operations_are_declared(expected):
    def run(place=0):
        out = torch.zeros(2, dtype=torch.int32)
        collect[(3,)](numbers(3).int(), out[:1], EXPECTED=expected, PLACE=place)
        return [out]

    assert "programs (0, 0, 0) and (2, 0, 0) both write out[0]" in wrong_with(run, "collect")
    assert wrong_with(run, "collect", "collect") == []
    outside = wrong_with(lambda: run(1), "collect", "collect")
    assert "program (0, 0, 0) changes memory outside its arguments (1 elements)" in outside and len(outside) == 3
    with recorded(shuffle=False):
        assert not run(1)[0].any()


def test_an_atomic_sum_of_floats_depends_on_the_order():
    def run():
        out = torch.zeros(1)
        collect[(3,)](torch.tensor([1e8, -1e8, 1.0]), out, EXPECTED=False, PLACE=0)
        return [out]

    assert wrong_with(run, "collect", "collect") == ["result 0 depends on the order of programs"]


@pytest.mark.parametrize("wait", [True, False])
def test_threads_of_one_program_wait_for_each_other(wait):
    def run():
        work, out = torch.empty(2 * BLOCK), torch.empty(2 * BLOCK)
        two_stages[(2,)](numbers(2 * BLOCK), work, out, WAIT=wait, BLOCK=BLOCK)
        return [out]

    wrong = wrong_with(run, "two_stages")
    expected = [
        f"program ({program}, 0, 0) reads work[{program * BLOCK + BLOCK - 1}], which it wrote itself, with no barrier in between"
        for program in (0, 1)
    ]
    assert sorted(wrong) == ([] if wait else expected)


def test_threads_of_one_program_write_different_elements():
    def run():
        out = torch.empty(2 * BLOCK)
        halved[(2,)](out, BLOCK=BLOCK)
        return [out]

    wrong = wrong_with(run, "halved")
    assert "program (1, 0, 0) writes an element of out twice in one store" in wrong
    assert "no program writes out[4], though others of its elements are written" in wrong and "result 0 holds NaN" in wrong


def test_memory_outside_the_arguments_is_not_touched():
    outs = []

    def run():
        x, out = numbers(64), torch.full((64,), 7.0)
        outs.append(out)
        double[(PROGRAMS,)](x[:COUNT], out[:COUNT], COUNT, SHIFT=0, REACH=2, BLOCK=BLOCK)
        return [out]

    found = [f"program (2, 0, 0) {verb} memory outside its arguments (2 elements)" for verb in ("reads", "writes")]
    assert wrong_with(run, "double") == found
    assert len(outs) == 2 and all(bool((out[COUNT:] == 7).all()) for out in outs)


@pytest.mark.parametrize("programs", [1, 2, 3, 24])
def test_the_order_is_another_one(programs):
    orders = []
    for shuffle in (False, True):
        out, count = torch.zeros(programs), torch.zeros(1)
        with recorded(shuffle):
            numbered[(1, programs, 1)](out, count)
        orders.append(out.tolist())
    assert orders[0] == sorted(orders[1]) == list(range(programs)) and (orders[0] != orders[1]) == (programs > 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_elements_that_no_program_writes(dtype):
    def run():
        x, out = numbers().to(dtype), torch.empty(COUNT, dtype=dtype)
        double[(PROGRAMS,)](x, out, COUNT - 2, SHIFT=0, REACH=0, BLOCK=BLOCK)
        return [out]

    wrong = wrong_with(run, "double")
    assert wrong[0] == "no program writes out[19], though others of its elements are written"
    assert ("result 0 holds NaN" in wrong) == dtype.is_floating_point


def test_what_lies_between_the_elements_of_a_view_is_not_missing():
    def run():
        out = torch.empty(4 * BLOCK)[::2]
        every_second[(2,)](out, BLOCK=BLOCK)
        return [out]

    assert wrong_with(run, "every_second") == []


@pytest.mark.parametrize("early", [0, 1])
@pytest.mark.parametrize("made", [True, False])
def test_tensor_descriptors(early, made):
    """Made in the kernel or on the host."""

    def run():
        x, out = numbers(160).reshape(10, 16), torch.empty(10, 16)
        arguments = (x, out) if made else (TensorDescriptor.from_tensor(tensor, [4, 16]) for tensor in (x, out))
        copied_by_descriptor[(3,)](*arguments, 10, EARLY=early, MADE=made)
        return [out]

    expected = ["programs (0, 0, 0) and (1, 0, 0) both write out[48]"] if early else []
    assert wrong_with(run, "copied_by_descriptor") == expected


def test_arguments_that_share_memory():
    def run():
        both = numbers(COUNT + BLOCK)
        double[(PROGRAMS,)](both[BLOCK:], both[:COUNT], COUNT, SHIFT=0, REACH=0, BLOCK=BLOCK)
        return [both]

    assert "program (0, 0, 0) reads out[8], which (1, 0, 0) writes" in wrong_with(run, "double")


def test_the_interpreter_is_as_it_was_before():
    from triton.runtime import interpreter

    names = ("set_grid_idx", "set_grid_dim", "create_barrier")
    before = (interpreter._interpreter, interpreter.GridExecutor.__call__)
    disturbed(doubled())
    assert before == (interpreter._interpreter, interpreter.GridExecutor.__call__)
    assert not vars(interpreter.interpreter_builder).keys() & set(names)
