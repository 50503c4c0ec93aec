"""The training step on the Triton kernels, in the interpreter or on a GPU, against autograd through the plain extractor."""

from __future__ import annotations

import copy

import pytest
import torch

from der_fast.kernels import choices
from der_fast.model import paths
from der_fast.model.architecture import Architecture, Block, Conv, build_architecture
from der_fast.model.extractor import Extractor
from der_fast.model.fused import FusedTraining

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def small_network():
    """Every kind of join and of convolution once: an identity, a strided projection, zero channels behind; 3×3 and 1×1."""
    groups = {"stream": 5, "more": 3, "last": 4, "a": 3, "b": 6, "c": 2}
    blocks = (
        Block("identity", (Conv("conv1", ("stream",), ("a",), 3), Conv("conv2", ("a",), ("stream",), 1))),
        Block("widened", (Conv("conv1", ("stream",), ("b",), 1, 2), Conv("conv2", ("b",), ("stream", "more"), 1))),
        Block(
            "projection",
            (Conv("conv1", ("stream", "more"), ("c",), 3, 2), Conv("conv2", ("c",), ("last",), 3)),
            Conv("shortcut", ("stream", "more"), ("last",), 1, 2),
        ),
    )
    return Architecture("small", groups, Conv("stem", (), ("stream",), 3), False, blocks)


def outcome(forward, extractor, masks, images, weights):
    """Features, every gradient and every statistic."""
    masks = masks.clone().requires_grad_()
    extractor.zero_grad()
    features = forward(images, masks)
    (features * weights).sum().backward()
    return [features.detach(), masks.grad, *(p.grad for p in extractor.parameters()), *extractor.buffers()]


def distances(found, wanted):
    return [
        float((one.double() - other).abs().max() / other.abs().max().clamp(min=1e-30)) for one, other in zip(found, wanted, strict=True)
    ]


def compare(architecture, images, dtype, path, **options):
    """Against double precision, no tensor may be farther off than twice the plain extractor's in the same precision, its worst, or a floor.

    Errors are relative to a tensor's largest entry. The floor is what sums over N·H·W terms in float32 may lose, and what a handful of
    roundings of activations amount to.
    """
    floor = images[:, 0].numel() * torch.finfo(torch.float32).eps + 8 * torch.finfo(dtype).eps
    plain = Extractor(architecture).initialise(seeded(0)).to(DEVICE).train()
    fused, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    masks = torch.rand(plain.maskable, generator=seeded(1)).to(DEVICE)
    weights = torch.randn(len(images), plain.features, generator=seeded(2)).to(DEVICE)
    images = images.to(DEVICE)

    def autocast(batch, mask):
        with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
            return plain(batch, mask).float()

    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        wanted = outcome(exact, exact, masks.double(), images.double(), weights.double())
        usual = distances(outcome(autocast, plain, masks, images, weights), wanted)
        step = FusedTraining(fused, dtype, path=path, **options)
        found = distances(outcome(step, fused, masks, images, weights), wanted)
    for error, other in zip(found, usual, strict=True):
        assert error <= max(2 * other, max(usual), floor)


@pytest.mark.parametrize(("path", "dtype"), [(paths.CHAIN, torch.float32), (paths.CHAIN, torch.bfloat16), (paths.CUDNN, torch.float32)])
def test_a_small_network(path, dtype):
    images = torch.randn(3, 3, 6, 5, generator=seeded(3))
    compare(small_network(), images, dtype, path)


@pytest.mark.parametrize("path", ["auto", *paths.FORWARD])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("backbone", "stem", "side"),
    [
        pytest.param("resnet18", "small", 32, marks=gpu),
        pytest.param("resnet50", "imagenet", 64, marks=gpu),
        pytest.param("resnet20", "small", 32, marks=gpu),
        pytest.param("preact_resnet18", "small", 32, marks=gpu),
    ],
)
def test_backbones_on_a_gpu(backbone, stem, side, dtype, path):
    images = torch.randn(16, 3, side, side, generator=seeded(3))
    compare(build_architecture(backbone, width=16, stem=stem), images, dtype, path, choices=choices.Choices())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_twenty_runs_give_the_same_bits():
    images = torch.randn(32, 3, 32, 32, generator=seeded(3)).to(DEVICE)
    runs = []
    for _ in range(20):
        extractor = Extractor(build_architecture("resnet18")).initialise(seeded(0)).to(DEVICE).train()
        masks = torch.rand(extractor.maskable, generator=seeded(1)).to(DEVICE)
        step = FusedTraining(extractor, torch.bfloat16, path=paths.CHAIN)
        runs.append(outcome(step, extractor, masks, images, torch.ones(32, 512, device=DEVICE)))
    assert all(torch.equal(one, other) for run in runs[1:] for one, other in zip(run, runs[0], strict=True))
