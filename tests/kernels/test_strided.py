"""1×1 convolutions that skip pixels: the values and gradients of every narrow shape, in a process that a damaged heap may end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from der_fast.kernels.conv.strided import convolve, convolve_backward

FAMILY = Path(__file__).with_name("strided_family.py")
# Sums of at most 9 products forward and for x, of at most 3 · 9 · 9 for a weight.
FEW, MANY = 9 * 2**-23, 3 * 9 * 9 * 2**-23


# A processor that lacks an instruction set uses what it has.
@pytest.mark.parametrize("instructions", [None, "SSE41", "AVX2", "AVX512_CORE"])
def test_every_narrow_shape_is_right_and_leaves_the_heap_whole(instructions):
    environment = {name: value for name, value in os.environ.items() if name != "ONEDNN_MAX_CPU_ISA"}
    environment |= {"ONEDNN_MAX_CPU_ISA": instructions} if instructions else {}
    done = subprocess.run([sys.executable, str(FAMILY)], capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, f"ended with {done.returncode}: {done.stderr[-500:]}"
    count, forward, for_x, for_weight = map(float, done.stdout.split())
    assert count == 9 * 11 * 3 * 2
    assert forward <= FEW and for_x <= FEW and for_weight <= MANY


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (1, 2), (1, 3), (3, 1), (3, 2), (7, 2)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_it_is_the_convolution(kernel, stride, layout):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 11, 14, dtype=torch.float64, generator=generator).to(memory_format=layout).requires_grad_()
    weight = torch.randn(4, 3, kernel, kernel, dtype=torch.float64, generator=generator).to(memory_format=layout).requires_grad_()
    ours, theirs = convolve(x, weight, stride, kernel // 2), F.conv2d(x, weight, stride=stride, padding=kernel // 2)
    torch.testing.assert_close(ours, theirs)
    g = torch.randn(theirs.shape, dtype=torch.float64, generator=generator)
    wanted = torch.autograd.grad(theirs, (x, weight), g)
    torch.testing.assert_close(torch.autograd.grad(ours, (x, weight), g), wanted)
    torch.testing.assert_close(convolve_backward(g, x.detach(), weight.detach(), stride, kernel // 2, (True, True)), wanted)
