"""`masks_and_sparsity` on a GPU: a large network, the bits of the CPU, and a captured graph."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from der_fast import native
from der_fast.kernels.channel_masks import ConvolutionGroups, MaskStructure, masks_and_sparsity

poisoned = runpy.run_path(str(Path(__file__).with_name("mask_structures.py")))["poisoned"]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def large():
    generator = torch.Generator().manual_seed(4)
    widths = torch.randint(0, 300, (160,), generator=generator).tolist()
    convs = [ConvolutionGroups((), (0, 1), 3, 49), *(ConvolutionGroups((g, (g + 7) % 160), (g + 1,), 0, 9) for g in range(150))]
    structure = MaskStructure.of(widths, convs, device="cuda")
    return structure, torch.randn(structure.channels, generator=generator).cuda()


def skip_without(backend):
    if backend == "native" and not native.build_info()["cuda"]:
        pytest.skip("der_fast._C was built without CUDA")


@pytest.mark.parametrize("backend", ["fused", "native"])
def test_a_large_network_twenty_times(backend):
    skip_without(backend)
    structure, logits = large()
    expected = [value.detach() for value in masks_and_sparsity(logits.double(), 30.0, structure)]
    upstream, first = torch.randn_like(logits), None
    for _ in range(20):
        leaf = logits.clone().requires_grad_()
        masks, loss = masks_and_sparsity(leaf, 30.0, structure, backend=backend)
        (gradient,) = torch.autograd.grad((masks * upstream).sum() + 0.3 * loss, leaf)
        found = [masks.detach(), loss.detach(), gradient]
        first = first or found
        assert all(torch.equal(*pair) for pair in zip(first, found, strict=True))
    # The product s·e in single precision is off by up to 2⁻²⁴·|s·e|, and σ is steepest at 0.
    torch.testing.assert_close(first[0].double(), expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(first[1].double(), expected[1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_native_backend_has_the_bits_of_the_cpu(dtype):
    skip_without("native")
    structure, logits = large()
    found = []
    for device in ("cpu", "cuda"):
        leaf = logits.to(device, dtype).requires_grad_()
        masks, loss = masks_and_sparsity(leaf, 30.0, structure.to(device), backend="native")
        upstream = torch.linspace(-1, 1, len(leaf), dtype=torch.float64).to(device, dtype)
        (gradient,) = torch.autograd.grad([masks, loss], leaf, [upstream, torch.full_like(loss, 0.3)])
        found.append([masks.detach().cpu(), loss.detach().cpu(), gradient.cpu()])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("backend", ["fused", "native"])
def test_a_captured_graph_replays_with_another_scale(backend):
    skip_without(backend)
    structure, logits = large()
    scale, leaf = torch.tensor(2.0, device="cuda"), logits.clone().requires_grad_()

    def step():
        masks, loss = masks_and_sparsity(leaf, scale, structure, backend=backend)
        (gradient,) = torch.autograd.grad(masks.square().sum() + loss, leaf)
        return masks.detach(), loss.detach(), gradient

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = step()
    for value in (0.5, 80.0):
        scale.fill_(value)
        graph.replay()
        replayed = [tensor.clone() for tensor in held]
        assert all(torch.equal(*pair) for pair in zip(replayed, step(), strict=True))
