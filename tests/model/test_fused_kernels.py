"""The training step on the Triton kernels, in the interpreter or on a GPU, against autograd through the plain extractor."""

from __future__ import annotations

import copy
import statistics
import unittest.mock

import pytest
import torch

from der_fast.kernels import choices
from der_fast.model import paths
from der_fast.model.architecture import Architecture, Block, Conv, build_architecture
from der_fast.model.extractor import Extractor
from der_fast.model.fused_training import FusedTraining

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# What float32 may move values of about one by, Winograd's convolutions included.
CORNER = 5e-6
# The first seed with such images, by what was searched for: a search takes up to a hundred forward passes.
SEEDS = {}
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


def draw_images(shape, exact, masks):
    """Images for which no value in double precision lies so near a ReLU's corner that rounding in float32 could carry it across.

    Gradients jump there: one value of a million on the other side is an error of a few percent, ours or eager's, whoever has it.
    """
    relu_, nearest = torch.Tensor.relu_, []

    def watched(z):
        nearest.append(float(z.detach().abs().min()))
        return relu_(z)

    key = f"{exact.architecture} {shape}"
    for seed in range(SEEDS.get(key, 3), 2000):
        images, exact = torch.randn(*shape, generator=seeded(seed)).to(DEVICE), copy.deepcopy(exact)
        with torch.no_grad(), unittest.mock.patch.object(torch.Tensor, "relu_", watched):
            exact(images.double(), masks.double())
        if min(nearest) > CORNER:
            SEEDS[key] = seed
            return images
        nearest.clear()
    raise AssertionError("no images without a value near a corner: make them smaller")


def compare(architecture, shape, dtype, path, **options):
    """Against double precision, tensor by tensor: errors, relative to the largest entry, beside those of the plain extractor in `dtype`.

    No error may exceed twice the plain extractor's, its worst, or the floor: in float32 what a network's worth of roundings amounts to,
    in half precision what a few do. There features and statistics may not lean on the worst; and the median of all gradients, of which
    roundings that carry values across the corners of ReLUs make single ones scatter, stays within twice eager's too.
    """
    half = dtype != torch.float32
    floor = 2 * torch.finfo(dtype).eps if half else 128 * torch.finfo(dtype).eps
    plain = Extractor(architecture).initialise(seeded(0)).to(DEVICE).train()
    fused, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    masks = torch.rand(plain.maskable, generator=seeded(1)).to(DEVICE)
    weights = torch.randn(shape[0], plain.features, generator=seeded(2)).to(DEVICE)
    images = torch.randn(*shape, generator=seeded(3)).to(DEVICE) if half else draw_images(shape, exact, masks)

    def autocast(batch, mask):
        with torch.autocast(DEVICE.type, dtype, enabled=half):
            return plain(batch, mask).float()

    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        wanted = outcome(exact, exact, masks.double(), images.double(), weights.double())
        usual = distances(outcome(autocast, plain, masks, images, weights), wanted)
        step = FusedTraining(fused, dtype, path=path, **options)
        found = distances(outcome(step, fused, masks, images, weights), wanted)
    names = ["features", "masks", *(name for name, _ in plain.named_parameters()), *(name for name, _ in plain.named_buffers())]
    gradients = set(names[1 : 2 + len(list(plain.parameters()))])
    for name, error, other in zip(names, found, usual, strict=True):
        assert error <= max(2 * other, floor, max(usual) if name in gradients or not half else 0.0), name
    if half:
        ratios = [error / max(other, 1e-30) for name, error, other in zip(names, found, usual, strict=True) if name in gradients]
        assert statistics.median(ratios) <= 2, ratios


@pytest.mark.parametrize(("path", "dtype"), [(paths.CHAIN, torch.float32), (paths.CHAIN, torch.bfloat16), (paths.CUDNN, torch.float32)])
def test_a_small_network(path, dtype):
    compare(small_network(), (3, 3, 6, 5), dtype, path)


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
    batch, width = 16, 16
    if dtype == torch.float32:
        # Of many more values some would always lie near a corner.
        batch, side, width = 4, side if stem == "imagenet" else side // 2, 4 if stem == "imagenet" else width
    compare(build_architecture(backbone, width=width, stem=stem), (batch, 3, side, side), dtype, path, choices=choices.Choices())


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
