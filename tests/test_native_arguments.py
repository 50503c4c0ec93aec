"""Every argument of the native module is read by name: what does not fit is refused by it, with what it must be and what it was."""

from __future__ import annotations

import inspect
import re
import reprlib

import pytest
import torch

from der_fast import native
from der_fast.kernels.channel_masks.structure import TABLES, ConvolutionGroups, MaskStructure

MASKS = ["channel_masks_forward", "channel_masks_backward"]
FUNCTIONS = ["plan", "pack", "pack_cuda", "lanes_program", "run_lanes", *MASKS]
# None stands for the CPU, or for a gradient that nothing asked for.
OPTIONAL = ("device", "grad_masks", "grad_loss")
ARGUMENTS = [(function, argument) for function in FUNCTIONS for argument in inspect.signature(getattr(native, function)).parameters]
ENTRIES = {
    "jobs[0]": ("pack", ["kind", "offset", "dtype", "rows", "columns", "weight", "norm"]),
    "units[0]": ("plan", ["kind", "block", "when", "source", "target", "kernel", "norm"]),
    "ops[0]": ("lanes_program", ["kind", "source", "residual", "inputs", "outputs", "kernel", "stride", "relu", "weight", "bias"]),
}
FACTS = ["address", "shape", "strides", "dtype"]
# Of no type that any argument has; True is no number here, and 2**70 none that 64 bits hold.
WRONG = ["8", b"8", {8}, True, 2.5, 2**70, [2**70], object, {}]


class Good:
    """Arguments that every function accepts; the tensors live as long as the object."""

    def __init__(self):
        self.keep = torch.tensor([True, True])
        self.index = torch.arange(2, dtype=torch.int32)
        self.weight = torch.ones(2, 2, 1, 1)
        self.vector = torch.ones(2)
        memory = torch.zeros(128, dtype=torch.uint8)
        self.storage = memory[-memory.data_ptr() % 64 :][:64]
        self.images = torch.ones(2, 3, 4, 4)
        self.output = torch.empty(2, 3)
        self.arena = torch.zeros(36, dtype=torch.uint8)
        index, vector = native.facts_of(self.index), native.facts_of(self.vector)
        job = (0, 0, native.DTYPES["torch.float32"], index, index, native.facts_of(self.weight), (vector,) * 4)
        network = {"groups": [2], "image_channels": 3, "streams": [[0]], "inner": [], "units": [(0, -1, 0, [], [0], 3, True)]}
        operations = [(0, 0, -1, 3, 3, 1, 1, 1, 0, -1), (5, 1, -1, 3, 3, 1, 1, 0, -1, -1)]
        packing = {"jobs": [job], "storage": native.facts_of(self.storage), "layout": 0, "epsilon": 1e-5}
        self.calls = {
            "plan": {"network": network, "keep": native.facts_of(self.keep), "align": 8, "weight_dtype": 1, "vector_dtype": 1},
            "pack": {**packing, "threads": 1},
            "pack_cuda": {**packing, "workspace": native.facts_of(self.storage), "device": 0, "stream": 0},
            **self.masks_calls(),
            "lanes_program": {"image_channels": 3, "ops": operations, "bytes": 36},
            "run_lanes": {
                "programs": [native.lanes_program(3, operations, 36)],
                "arenas": [native.facts_of(self.arena)],
                "images": native.facts_of(self.images),
                "output": native.facts_of(self.output),
                "threads": 1,
            },
        }

    def masks_calls(self):
        """One group of two channels, which a convolution of the image writes."""
        self.structure = MaskStructure.of([2], [ConvolutionGroups((), (0,), 3, 9)])
        tables = (*(native.facts_of(getattr(self.structure, name)) for name in TABLES), self.structure.full)
        self.numbers = [torch.ones(2), torch.ones(2), torch.ones(2), torch.ones(()), torch.ones(())]
        self.work = torch.zeros(4, dtype=torch.float64)
        logits, masks, gradient, scale, loss = map(native.facts_of, self.numbers)
        forward = {"structure": tables, "logits": logits, "scale": scale, "masks": masks, "loss": loss, "work": native.facts_of(self.work)}
        backward = {"structure": tables, "logits": logits, "sides": native.facts_of(self.work[2:]), "grad_masks": masks, "grad_loss": loss}
        place = {"device": None, "stream": 0}
        return dict(zip(MASKS, ({**forward, **place}, {**backward, "gradient": gradient, **place}), strict=True))


@pytest.fixture
def good():
    return Good()


def called(function, arguments):
    needs_cuda = function == "pack_cuda" or (function in MASKS and arguments["device"] is not None)
    if needs_cuda and not native.build_info()["cuda"]:
        pytest.skip("der_fast._C was built without CUDA")
    return getattr(native, function)(**arguments)


def refused(name, value, function, arguments):
    """Assert that the message begins with the argument's name, perhaps with that of an entry, and shows the value or the entry."""
    shown = reprlib.repr(value[0] if isinstance(value, list) else value)
    with pytest.raises(ValueError, match=rf"^{re.escape(name)}(\[0\])? must be .*not \[?{re.escape(shown)}"):
        called(function, arguments)


def wrong_for(name):
    """Whatever of WRONG the argument cannot be."""
    if name == "epsilon":  # a number of any size
        return [value for value in WRONG if value not in (2.5, 2**70)]
    return [value for value in WRONG if not (name in ("network", "norm") and value in ({}, True))]


@pytest.mark.parametrize("function", ["plan", "pack", "lanes_program", "run_lanes", *MASKS])
def test_the_good_call_is_accepted(good, function):
    if function == "run_lanes" and native.lanes_isa() is None:
        pytest.skip("this processor has neither AVX-512 nor AVX2")
    called(function, good.calls[function])


@pytest.mark.parametrize(("function", "argument"), ARGUMENTS)
def test_every_argument_is_refused_by_name(good, function, argument):
    arguments = good.calls[function]
    # pack_cuda has no CPU to fall back to.
    nothing = [] if argument in OPTIONAL and function in MASKS else [None]
    for value in [*nothing, *wrong_for(argument)]:
        refused(argument, value, function, {**arguments, argument: value})


@pytest.mark.parametrize(("function", "argument"), [pair for pair in ARGUMENTS if pair[1] in ("keep", "storage", "images", "output")])
@pytest.mark.parametrize(("position", "entry"), list(enumerate(FACTS)))
def test_every_entry_of_a_tensor_is_refused_by_name(good, function, argument, position, entry):
    facts = good.calls[function][argument]
    for value in [None, *WRONG]:
        changed = (*facts[:position], value, *facts[position + 1 :])
        refused(f"{argument}.{entry}", value, function, {**good.calls[function], argument: changed})


@pytest.mark.parametrize(("name", "position", "entry"), [(name, *pair) for name, row in ENTRIES.items() for pair in enumerate(row[1])])
def test_every_entry_of_a_row_is_refused_by_name(good, name, position, entry):
    function, argument = ENTRIES[name][0], name[:-3]
    holder = good.calls[function]["network"] if argument == "units" else good.calls[function]
    row = holder[argument][0]
    for value in wrong_for(entry):
        holder[argument] = [(*row[:position], value, *row[position + 1 :])]
        refused(f"{name}.{entry}", value, function, good.calls[function])


@pytest.mark.parametrize("entry", ["groups", "image_channels", "streams", "inner", "units"])
def test_every_entry_of_a_network_is_refused_by_name(good, entry):
    arguments = good.calls["plan"]
    for value in [None, *WRONG]:
        refused(entry, value, "plan", {**arguments, "network": {**arguments["network"], entry: value}})


@pytest.mark.parametrize(
    ("function", "change", "words"),
    [
        ("plan", {"align": "8"}, "align must be a whole number from 1 to 1024, not '8'"),
        ("plan", {"align": 0}, "align must be a whole number from 1 to 1024, not 0"),
        ("pack", {"epsilon": float("inf")}, "epsilon must be a finite number of at least 0, not inf"),
        ("pack", {"threads": 1025}, "threads must be a whole number from 0 to 1024, not 1025"),
        ("pack", {"storage": (64, (2,) * 50, (1,) * 50, 6)}, "storage is too large"),
        ("pack", {"storage": (64, (2**31, 2), (2**40, 1), 6)}, "storage reaches too far"),
        ("lanes_program", {"bytes": -5}, "bytes must be a whole number from 0 to 9223372036854775807, not -5"),
        ("lanes_program", {"image_channels": 2**30}, "image_channels must be a whole number from 1 to 1048576, not 1073741824"),
        (
            "lanes_program",
            {"ops": [(0,) * 9]},
            r"ops[0] must be (kind, source, residual, inputs, outputs, kernel, stride, relu, weight, bias)",
        ),
        ("lanes_program", {"ops": [(0, -2, *(0,) * 8)]}, "ops[0].source must be a whole number from -1 to 2147483647, not -2"),
        ("run_lanes", {"threads": 0}, "threads must be a whole number from 1 to 1024, not 0"),
        ("run_lanes", {"threads": 1025}, "threads must be a whole number from 1 to 1024, not 1025"),
        ("run_lanes", {"programs": [None]}, "programs[0] must be a LanesProgram, not None"),
        ("run_lanes", {"programs": []}, "arenas must be as many as programs, 0, not 1"),
    ],
)
def test_values_out_of_range_are_refused(good, function, change, words):
    with pytest.raises(ValueError, match="^" + re.escape(words)):
        called(function, {**good.calls[function], **change})


def test_which_of_images_and_output_is_not_float32_is_said(good):
    double = torch.zeros(2, 3, 4, 4, dtype=torch.float64)
    for name in ("images", "output"):
        with pytest.raises(ValueError, match=f"^{name} must be float32, not float64"):
            called("run_lanes", {**good.calls["run_lanes"], name: native.facts_of(double)})


def test_an_empty_output_is_contiguous(good):
    if native.lanes_isa() is None:
        pytest.skip("this processor has neither AVX-512 nor AVX2")
    output = torch.empty(2, 0)
    called("run_lanes", {**good.calls["run_lanes"], "programs": [], "arenas": [], "output": native.facts_of(output)})
    # Strides that a product of the sizes behind them would overflow.
    shape = (0, 2**31, 2**31, 2**31)
    with pytest.raises(ValueError, match=r"^output must have the shape \(2, 0\), not \(0, 2147483648"):
        called("run_lanes", {**good.calls["run_lanes"], "programs": [], "arenas": [], "output": (0, shape, (1,) * 4, 1)})


def test_what_cannot_be_shown_is_named_by_its_type(good):
    class Mute:
        def __repr__(self):
            return "\ud800"

    with pytest.raises(ValueError, match="^align must be a whole number from 1 to 1024, not a Mute"):
        native.plan(**{**good.calls["plan"], "align": Mute()})


def test_plans_too_large_are_refused(good):
    keep = torch.ones(2**21, dtype=torch.bool)
    network = {**good.calls["plan"]["network"], "groups": [2**21], "units": [(0, -1, 0, [0], [0], 31, True)]}
    with pytest.raises(ValueError, match="^units are too large: together they have more than"):
        native.plan(network, native.facts_of(keep), align=1, weight_dtype=1, vector_dtype=1)
