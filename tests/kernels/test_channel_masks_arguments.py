"""What `masks_and_sparsity` and its native module refuse, by name; and the tables that they are given."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from der_fast import native
from der_fast.errors import BackendError
from der_fast.kernels import triton_runtime
from der_fast.kernels.channel_masks import ConvolutionGroups, MaskStructure, masks_and_sparsity

structure_of = runpy.run_path(str(Path(__file__).with_name("mask_structures.py")))["structure_of"]


def test_tables_by_hand():
    convs = [ConvolutionGroups((), (0,), 3, 9), ConvolutionGroups((0,), (0, 1), 0, 4), ConvolutionGroups((0, 1), (1,), 0, 1)]
    structure = MaskStructure.of([3, 130], convs)
    assert structure.channels == 133 and structure.span == 2
    assert structure.full == 9 * 3 * 3 + 4 * 3 * 133 + 133 * 130
    assert structure.rows.tolist() == [[0, 3, 0], [3, 131, 1], [131, 133, 1]] and structure.row_offsets.tolist() == [0, 1, 3]
    assert structure.convs.tolist() == [[3, 9, -1, -1, 0, -1], [0, 4, 0, -1, 0, 1], [0, 1, 0, 1, 1, -1]]
    # Across from what group 0 reads lies what is written (3 + l), and the other way round.
    assert structure.user_offsets.tolist() == [0, 4, 7]
    assert sorted(structure.users[:4].tolist()) == [0, 1, 4, 5] and sorted(structure.users[4:].tolist()) == [1, 2, 5]
    assert all(getattr(structure, name).dtype == torch.int32 for name in ("rows", "row_offsets", "convs", "user_offsets", "users"))


@pytest.mark.parametrize(
    ("widths", "convs", "words"),
    [
        ([], [ConvolutionGroups((), (0,), 3, 9)], "needs groups and convolutions; got 0 and 1"),
        ([4], [], "needs groups and convolutions; got 1 and 0"),
        ([4, -1], [ConvolutionGroups((), (0,), 3, 9)], "widths must be ≥ 0; group 1 has -1"),
        ([4], [ConvolutionGroups((), (1,), 3, 9)], r"convolution 0 writes groups \(1,\): they must be distinct and lie in 0 … 0"),
        ([4], [ConvolutionGroups((0, 0), (0,), 0, 9)], r"convolution 0 reads groups \(0, 0\)"),
        ([4], [ConvolutionGroups((), (0,), -1, 9)], "convolution 0 needs image ≥ 0"),
        ([4], [ConvolutionGroups((), (0,), 3, 0)], "area ≥ 1, not 3 and 0"),
        ([0], [ConvolutionGroups((), (0,), 3, 9)], "the network has no parameters"),
    ],
)
def test_networks_that_make_no_sense_are_refused(widths, convs, words):
    with pytest.raises(ValueError, match=words):
        MaskStructure.of(widths, convs)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"backend": "cuda"}, "channel_masks: unknown backend 'cuda': choose from reference, fused, native"),
        ({"logits": torch.zeros(22)}, r"logits must be .* one per channel of the structure \(23\); got torch.float32, \(22,\)"),
        ({"logits": torch.zeros(23).half()}, "logits must be float32 or float64.* got torch.float16"),
        ({"logits": torch.zeros(23, dtype=torch.int64)}, "got torch.int64"),
        ({"logits": torch.zeros(46)[::2]}, r"contiguous.*strides \(2,\)"),
        ({"logits": torch.zeros(23, 1)}, r"\(23, 1\)"),
        ({"logits": torch.zeros(23, device="meta")}, "tables are on .*, the logits on meta; use structure.to"),
        ({"scale": torch.ones(2)}, r"scale must be a number or .* one element.*got torch.float32, \(2,\)"),
        ({"scale": torch.tensor(3)}, "scale must be .*got torch.int64"),
        ({"scale": torch.ones((), device="meta")}, "on cpu; got torch.float32, .* on meta"),
    ],
)
def test_wrong_arguments_are_refused_by_name(change, words):
    arguments = {"logits": torch.zeros(23), "scale": 1.0, "structure": structure_of("odd"), **change}
    with pytest.raises(ValueError, match=words):
        masks_and_sparsity(**arguments)


def test_without_triton_the_fused_backend_says_so(monkeypatch):
    monkeypatch.setattr(triton_runtime, "usable", lambda device: (False, "Triton is not installed (gone)"))
    with pytest.raises(BackendError, match="channel_masks cannot run here: Triton is not installed.*'reference' or 'auto'"):
        masks_and_sparsity(torch.zeros(23), 1.0, structure_of("odd"), backend="fused")


def test_without_the_native_module_the_native_backend_says_so(monkeypatch):
    monkeypatch.setattr(native, "MODULE", "der_fast._no_such_module")
    native._load.cache_clear()
    with pytest.raises(BackendError, match="_no_such_module is not there"):
        masks_and_sparsity(torch.zeros(23), 1.0, structure_of("odd"), backend="native")
    monkeypatch.undo()
    native._load.cache_clear()


def native_arguments(**change):
    structure = structure_of("odd")
    tables = [structure.rows, structure.row_offsets, structure.convs, structure.user_offsets, structure.users]
    logits = torch.zeros(23)
    found = {
        "structure": (*(native.facts_of(table) for table in tables), structure.full),
        "logits": native.facts_of(logits),
        "scale": native.facts_of(torch.ones(1)),
        "masks": native.facts_of(torch.empty(23)),
        "loss": native.facts_of(torch.empty(1)),
        "work": native.facts_of(torch.empty(4 + 4 + 12, dtype=torch.float64)),
    }
    keep = [tables, logits]
    for name, value in change.items():
        position = {"rows": 0, "row_offsets": 1, "convs": 2, "user_offsets": 3, "users": 4, "full": 5}.get(name)
        facts = native.facts_of(value) if isinstance(value, torch.Tensor) else value
        if position is None:
            found[name] = facts
        else:
            found["structure"] = (*found["structure"][:position], facts, *found["structure"][position + 1 :])
        keep.append(value)
    return found, keep


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"structure": ()}, r"structure must be \(rows, row_offsets, convs, user_offsets, users, full\)"),
        ({"rows": torch.zeros(4, 2, dtype=torch.int32)}, "rows must have 3 columns, not 2"),
        ({"rows": torch.zeros(4, 3)}, "rows must be contiguous int32 of 2 dimension"),
        ({"rows": torch.zeros(4, 3, dtype=torch.int32)}, "rows is wrong at entry 0"),
        ({"row_offsets": torch.zeros(1, dtype=torch.int32)}, "row_offsets must have one entry more"),
        ({"convs": torch.zeros(6, 5, dtype=torch.int32)}, "convs must have 2 . 2.span columns, not 5"),
        ({"convs": torch.full((6, 6), 4, dtype=torch.int32)}, "convs is wrong at entry 0"),
        ({"user_offsets": torch.zeros(3, dtype=torch.int32)}, "user_offsets must be as long as row_offsets"),
        ({"users": torch.full((15,), 12, dtype=torch.int32)}, "users is wrong at entry 0|user_offsets is wrong"),
        ({"full": 0}, "full must be a whole number from 1 to"),
        ({"full": 1.5}, "full must be a whole number"),
        ({"logits": torch.zeros(23).half()}, "logits must be float32 or float64"),
        ({"logits": torch.zeros(24)}, "masks must have the shape"),
        ({"scale": torch.ones(2)}, "scale must be one float32 number"),
        ({"scale": torch.ones(1).double()}, "scale must be one float32 number"),
        ({"masks": torch.zeros(23).double()}, "masks must be float32, not float64"),
        ({"masks": torch.zeros(46)[::2]}, "masks must be contiguous"),
        ({"loss": torch.zeros(1, dtype=torch.int32)}, "loss must be one float32 number"),
        ({"work": torch.zeros(19, dtype=torch.float64)}, r"work must have the shape \(20\), not \(19\)"),
    ],
)
def test_the_native_module_refuses_by_name(change, words):
    arguments, keep = native_arguments(**change)
    with pytest.raises(ValueError, match=words):
        native.channel_masks_forward(**arguments, device=None, stream=0)
    assert keep


def test_the_native_backend_on_a_device_says_what_is_missing():
    if native.build_info()["cuda"]:
        pytest.skip("this build has CUDA: there is nothing to refuse")
    arguments, keep = native_arguments()
    with pytest.raises(BackendError, match="built without CUDA"):
        native.channel_masks_forward(**arguments, device=0, stream=0)
    assert keep
