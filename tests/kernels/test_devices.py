"""Every Triton kernel is launched with its tensors' device as the current one: Triton itself does not look where its arguments lie."""

from __future__ import annotations

import contextlib
import importlib
from types import SimpleNamespace

import torch

from der_fast.kernels import ahead_of_time
from der_fast.kernels.augment import augment_drawn
from der_fast.kernels.channel_masks import ConvolutionGroups, MaskStructure, masks_and_sparsity
from der_fast.kernels.conv import ConvTiles, boxes, conv_dgrad, conv_forward, conv_wgrad
from der_fast.kernels.device import capability
from der_fast.kernels.grouped_conv import GroupMember, grouped_conv, pack_layer
from der_fast.kernels.masked_bn import masked_bn

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = ConvTiles(16, 16, 16)
# Kernels for one generation of GPUs, with the smallest tile that it multiplies, and a split sum.
BOXED, BOXED_SMALL = capability(DEVICE) == boxes.CAPABILITY, ConvTiles(64, 64, 16, boxed=True, split=3)


def image(*size: int) -> torch.Tensor:
    return torch.ones(size, device=DEVICE).contiguous(memory_format=torch.channels_last)


def run_every_operation() -> None:
    vector = torch.ones(3, device=DEVICE)
    x, pair = image(2, 3, 4, 4), (vector, vector)
    k, affine = torch.ones(3, 3, device=DEVICE), SimpleNamespace(mean=vector, rstd=vector, scale=vector, shift=vector)
    fused = {"stride": 1, "config": SMALL, "backend": "fused"}

    masked_bn(x.clone().requires_grad_(), vector, vector, vector.clone(), vector.clone(), training=True, backend="fused").sum().backward()
    conv_forward(x, image(3, 3, 3, 3), prologue=pair, statistics=True, **fused)
    conv_dgrad(x, image(3, 3, 3, 3), (4, 4), g_affine=(k, x), epilogue=(x, affine), **fused)
    conv_wgrad(x, x, 3, split=2, **fused)
    if BOXED:
        half = image(2, 8, 4, 4).half()
        conv_forward(half, image(8, 8, 3, 3).half(), prologue=None, statistics=True, **fused | {"config": BOXED_SMALL})
    layer = pack_layer(
        [GroupMember(image(3, 3, 1, 1), None, 0, 0, 3)], kernel=1, stride=1, relu=True, inputs=3, dtype=x.dtype, device=DEVICE
    )
    grouped_conv(x, layer, backend="fused")
    numbers, plain = torch.arange(1, device=DEVICE), {"mean": (0.0,) * 3, "std": (1.0,) * 3, "padding": 0, "jitter": 0.0, "flip": False}
    augment_drawn(torch.zeros(1, 2, 2, 3, dtype=torch.uint8, device=DEVICE), key=(0, 0), numbers=numbers, backend="fused", **plain)
    structure = MaskStructure.of([3], [ConvolutionGroups((), (0,), 3, 9)], device=DEVICE)
    sum(value.sum() for value in masks_and_sparsity(vector.clone().requires_grad_(), 1.0, structure, backend="fused")).backward()


class Watched:
    """A kernel that notes its name, and the device that was chosen when it was launched."""

    def __init__(self, kernel, name, chosen, launched):
        self.kernel, self.name, self.chosen, self.launched = kernel, name, chosen, launched

    def __getitem__(self, grid):
        self.launched[self.name] = list(self.chosen)
        return self.kernel[grid]


def test_every_kernel_is_launched_on_the_device_of_its_tensors(monkeypatch):
    chosen, launched, names = [], {}, set()

    @contextlib.contextmanager
    def device_of(tensor):
        chosen.append(tensor.device.type)
        yield
        chosen.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for module in map(importlib.import_module, ahead_of_time.modules()):
        for name, value in list(vars(module).items()):
            if name.endswith("_kernel") and hasattr(value, "arg_names") and (BOXED or not module.__name__.endswith("triton_descriptor")):
                names.add(name)
                monkeypatch.setattr(module, name, Watched(value, name, chosen, launched))
    run_every_operation()
    assert launched == {name: [DEVICE.type] for name in names}
    assert len(names) == (16 if BOXED else 14)
