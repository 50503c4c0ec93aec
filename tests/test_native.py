"""The native module as it was built, and what is said where it was not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from der_fast import native
from der_fast.errors import BackendError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def missing(monkeypatch):
    """Hide the module, as if it had not been built."""
    monkeypatch.setattr(native, "MODULE", "der_fast._no_such_module")
    native._load.cache_clear()
    yield
    monkeypatch.undo()
    native._load.cache_clear()


def test_build_info():
    info = native.build_info()
    assert re.fullmatch(r"\S+ [\d.]+", info["compiler"])
    assert info["standard"] >= 202002
    assert "-ffp-contract=off" in info["flags"] and "-march" not in info["flags"]
    assert isinstance(info["cuda"], bool)
    assert (info["nvcc"] is not None) == info["cuda"] == (info["cuda_architectures"] is not None)
    works, words = native.available()
    assert works and info["compiler"] in words


@pytest.mark.parametrize(
    "call",
    [
        lambda: native.build_info(),
        lambda: native.plan({}, (0, (0,), (1,), 5), align=1, weight_dtype=1, vector_dtype=1),
        lambda: native.pack([], (0, (0,), (1,), 6), layout=0, epsilon=0.0, threads=1),
        lambda: native.pack_cuda([], (0, (0,), (1,), 6), (0, (0,), (1,), 6), layout=0, epsilon=0.0, device=0, stream=0),
    ],
)
def test_without_the_module_every_call_says_how_to_build_it(missing, call):
    with pytest.raises(BackendError, match=r"_no_such_module is not there .*pip install .*C\+\+20 compiler"):
        call()


def test_without_the_module_it_is_reported_and_the_package_can_be_imported(missing):
    works, reason = native.available()
    assert not works and "_no_such_module" in reason
    code = "import sys; sys.modules['der_fast._C'] = None\nimport der_fast.compaction, der_fast.native as n\nassert not n.available()[0]"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_module_does_not_load_torch():
    code = "import importlib.util, sys, pathlib\nimport der_fast._C\nassert 'torch' not in sys.modules, 'torch came with it'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})


def test_cuda_calls_without_cuda_say_how_to_get_it():
    if native.build_info()["cuda"]:
        pytest.skip("this build has CUDA: there is nothing to refuse")
    with pytest.raises(BackendError, match="built without CUDA: install with DER_FAST_CUDA=ON"):
        native.pack_cuda([], (0, (0,), (1,), 6), (0, (0,), (1,), 6), layout=0, epsilon=0.0, device=0, stream=0)
    with pytest.raises(BackendError, match="built without CUDA"):
        native.pack_cuda_workspace(1, 1)


def test_facts_of_a_tensor():
    tensor = torch.zeros(3, 4, dtype=torch.bfloat16)[:, 1::2]
    assert native.facts_of(tensor) == (tensor.data_ptr(), (3, 2), (4, 2), 2)
    with pytest.raises(ValueError, match="does not know torch.int16"):
        native.facts_of(torch.zeros(1, dtype=torch.int16))


def small_network(**change):
    """One group of two channels, one block whose inner group has one, the units of a basic block."""
    units = [
        (0, -1, 0, [], [0], 3, True),
        (0, 0, 1, [0], [1], 3, True),
        (0, 0, 1, [1], [0], 3, True),
        (2, 0, 2, [0], [0], 1, False),
    ]
    facts = {"groups": [2, 1], "image_channels": 3, "streams": [[0]], "inner": [[1]], "units": units}
    return {**facts, **change}


def planned(network, keep=(True, True, True), align=1, weight_dtype=1, vector_dtype=1):
    keep = torch.tensor(keep)
    return native.plan(network, native.facts_of(keep), align=align, weight_dtype=weight_dtype, vector_dtype=vector_dtype)


def test_plan_by_hand():
    found = planned(small_network(), keep=[False, True, True], align=4, weight_dtype=2)
    assert found["widths"] == [1, 1] and found["stored"] == [4, 4] and found["lost"] == [False] and not found["constant"]
    # Weights (4, 3 or 4, 3, 3) in bfloat16: 216 and 288 bytes; biases (4,) in float32; each at a multiple of 64.
    shapes = [
        (0, 0, (4, 3, 3, 3), 0),
        (0, 2, (4,), 256),
        (1, 0, (4, 4, 3, 3), 320),
        (1, 2, (4,), 640),
        (2, 0, (4, 4, 3, 3), 704),
        (2, 2, (4,), 1024),
    ]
    assert found["pieces"] == shapes and found["bytes"] == 1088
    assert [list(rows) for rows in found["rows"]] == [[1, -1, -1, -1], [0, -1, -1, -1], [1, -1, -1, -1], []]
    assert [list(columns) for columns in found["columns"]] == [[0, 1, 2], [1, -1, -1, -1], [0, -1, -1, -1], []]
    assert found["elements"] == 27 + 1 + 9 + 1 + 9 + 1 == found["parameters"] - 3
    assert found["stored_elements"] == 108 + 4 + 2 * (144 + 4)


def test_plan_of_a_lost_branch_and_of_nothing_by_hand():
    found = planned(small_network(), keep=[True, True, False])
    assert found["lost"] == [True] and [piece[:2] for piece in found["pieces"]] == [(0, 0), (0, 2), (3, 3)]
    assert found["parameters"] == 54 + 4 + 4
    nothing = planned(small_network(), keep=[False, False, True])
    assert nothing["constant"] and nothing["pieces"] == [] and nothing["bytes"] == nothing["parameters"] == 0
    assert list(nothing["keep"]) == [0, 0, 0] and nothing["widths"] == [0, 0]


UNIT = (0, -1, 0, [], [0], 3, True)


@pytest.mark.parametrize(
    ("network", "words"),
    [
        ({"groups": 1}, "network has no entry groups"),
        (small_network(groups=["two"]), r"groups\[0\] must be a whole number, not 'two'"),
        (small_network(groups=[-1, 1]), "groups has the width -1"),
        (small_network(groups=[2**22, 1]), "groups has more than"),
        (small_network(image_channels=0), "image_channels is out of range"),
        (small_network(streams=[[2]]), "streams names group 2, but there are 2"),
        (small_network(inner=[[-1]]), "inner names group -1"),
        (small_network(units=3), "units must be a list"),
        (small_network(units=[1]), r"units\[0\] must be a tuple"),
        (small_network(units=[UNIT[:6]]), r"units\[0\] must be \(kind, block"),
        (small_network(units=[(3, *UNIT[1:])]), r"units\[0\].kind is unknown"),
        (small_network(units=[UNIT, (0, 0, 3, *UNIT[3:])]), r"units\[1\].when is unknown"),
        (small_network(units=[(0, 1, 1, *UNIT[3:])]), r"units\[0\].block names block 1, but there are 1"),
        (small_network(units=[(0, -1, 0, [5], [0], 3, True)]), r"units\[0\].source names group 5"),
        (small_network(units=[(0, -1, 0, [], [9], 3, True)]), r"units\[0\].target names group 9"),
        (small_network(units=[(0, -1, 0, [], [0], 0, True)]), r"units\[0\].kernel is out of range"),
        (small_network(units=[(0, -1, 0, [], [0], "three", True)]), r"units\[0\].kernel must be a whole number"),
    ],
)
def test_descriptions_that_contradict_themselves_are_refused(network, words):
    network = {} if network == {"groups": 1} else network
    with pytest.raises(ValueError, match=words):
        planned(network)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"keep": [True, True]}, "keep must have 3 entries, not 2"),
        ({"keep": [1.0, 1.0, 1.0]}, "keep must be bool, not float32"),
        ({"keep": [[True, True, True]]}, r"keep must be a contiguous vector, not \(1, 3\)"),
        ({"align": 0}, "align must be a whole number from 1 to 1024, not 0"),
        ({"align": 1025}, "align must be a whole number from 1 to 1024, not 1025"),
        ({"weight_dtype": 4}, "weight_dtype must be a floating-point type, not int32"),
        ({"vector_dtype": 77}, "vector_dtype has the unknown dtype code 77"),
    ],
)
def test_other_bad_arguments_of_plan_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        planned(small_network(), **change)


def test_masks_that_are_neither_0_nor_1_are_refused():
    keep = torch.tensor([1, 2, 0], dtype=torch.uint8)
    facts = (keep.data_ptr(), (3,), (1,), native.DTYPES["torch.bool"])
    with pytest.raises(ValueError, match="keep must hold 0 and 1, not 2"):
        native.plan(small_network(), facts, align=1, weight_dtype=1, vector_dtype=1)


def a_call_of(function):
    """Return a call that works for some milliseconds."""
    if function == "plan":
        # Few channels, looked at again and again: NumPy gives the GIL away when it copies more than some hundred numbers.
        keep = torch.ones(400, dtype=torch.bool)
        network = small_network(groups=[399, 1], streams=[[0]] * 20_000)
        return lambda: native.plan(network, native.facts_of(keep), align=1, weight_dtype=1, vector_dtype=1)
    if function == "pack":
        index, weight = torch.arange(1000, dtype=torch.int32), torch.ones(1000, 1000, 1, 1)
        memory = torch.empty(4_000_064, dtype=torch.uint8)
        storage = memory[-memory.data_ptr() % 64 :][:4_000_000]

        def packed():
            job = (0, 0, 1, native.facts_of(index), native.facts_of(index), native.facts_of(weight), None)
            return native.pack([job], native.facts_of(storage), layout=0, epsilon=0.0, threads=1)

        return packed
    arena, images, output = torch.zeros(3 * 16 * 9 * 4, dtype=torch.uint8), torch.ones(64, 3, 32, 32), torch.empty(64, 16)
    program = native.lanes_program(3, [(0, 0, -1, 3, 16, 3, 1, 0, 0, -1), (5, 1, -1, 16, 16, 1, 1, 0, -1, -1)], len(arena))
    return lambda: native.run_lanes([program], [native.facts_of(arena)], native.facts_of(images), native.facts_of(output), 1)


@pytest.mark.parametrize("function", ["plan", "pack", "run_lanes"])
def test_other_threads_run_meanwhile(function):
    if function == "run_lanes" and native.lanes_isa() is None:
        pytest.skip("this processor has neither AVX-512 nor AVX2")
    call = a_call_of(function)
    call()  # the first one imports NumPy, which gives the GIL away too
    ready, go, counted = threading.Event(), threading.Event(), []

    def count():
        ready.set()
        go.wait()
        counted.append(1)

    other, interval = threading.Thread(target=count), sys.getswitchinterval()
    try:
        # Nobody is made to hand over the GIL any more: the other thread gets it where the call gives it away, or not at all.
        sys.setswitchinterval(1e3)
        other.start()
        ready.wait()
        go.set()
        for _ in range(300):  # the other thread may be slow to take its chance
            call()
            if counted:
                break
        seen = list(counted)
    finally:
        sys.setswitchinterval(interval)
        other.join()
    assert seen == [1], f"{function} held the GIL for 300 calls"
