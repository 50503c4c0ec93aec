"""Convolutions on a GPU: ResNet-18's shapes in bfloat16 against cuDNN, every candidate, equal bits, CUDA graphs, 64-bit offsets."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from der_fast.kernels.conv import ConvShape, ConvTiles, candidates, conv_dgrad, conv_forward, conv_wgrad

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

BF16 = torch.bfloat16
# ResNet-18 on 32×32: stem, the four stages, the steps between them and their shortcuts.
RESNET = [
    ConvShape(32, 3, 32, 32, 64, 3, 1),
    ConvShape(32, 64, 32, 32, 64, 3, 1),
    ConvShape(32, 64, 32, 32, 128, 3, 2),
    ConvShape(32, 64, 32, 32, 128, 1, 2),
    ConvShape(32, 128, 16, 16, 128, 3, 1),
    ConvShape(32, 256, 8, 8, 256, 3, 1),
    ConvShape(32, 256, 8, 8, 512, 3, 2),
    ConvShape(32, 512, 4, 4, 512, 3, 1),
    ConvShape(32, 24, 17, 17, 40, 3, 1),
]
DIRECTIONS = ("forward", "dgrad", "wgrad")


def draw(shape: ConvShape, dtype: torch.dtype = torch.float64) -> SimpleNamespace:
    """Random arguments that bfloat16 holds exactly, in `dtype`; coefficients that float32 holds."""
    generator = torch.Generator("cuda").manual_seed(shape.channels + shape.kernel)

    def normal(*size: int) -> Tensor:
        value = torch.randn(*size, generator=generator, device="cuda")
        if len(size) < 4:
            return value.double() if dtype == torch.float64 else value
        return value.to(BF16).to(dtype).contiguous(memory_format=torch.channels_last)

    inside = (shape.batch, shape.channels, shape.height, shape.width)
    outside = (shape.batch, shape.filters, shape.out_height, shape.out_width)
    scale, shift = normal(shape.channels), normal(shape.channels) + 1
    affine = SimpleNamespace(mean=normal(shape.channels), rstd=normal(shape.channels).abs() + 0.5, scale=scale, shift=shift)
    weight = normal(shape.filters, shape.channels, shape.kernel, shape.kernel)
    images = {"x": normal(*inside), "weight": weight, "g": normal(*outside), "y": normal(*outside)}
    vectors = {"scale": scale, "shift": shift, "k": normal(3, shape.filters)}
    return SimpleNamespace(shape=shape, affine=affine, **images, **vectors)


def run(
    direction: str, case: SimpleNamespace, backend: str, config: ConvTiles | None = None, transformed: bool = True
) -> tuple[Tensor, Tensor | None]:
    """One direction with everything around it, or with its sums only: the result, and the sums over all blocks."""
    stride, options = case.shape.stride, {"config": config, "backend": backend}
    prologue, g_affine = ((case.scale, case.shift), (case.k, case.y)) if transformed else (None, None)
    if direction == "forward":
        y, partials = conv_forward(case.x, case.weight, stride=stride, prologue=prologue, statistics=True, **options)
        count, mean, _ = partials.double().unbind(1)
        return y, (count * mean).sum(0)
    if direction == "dgrad":
        size = (case.shape.height, case.shape.width)
        more = {"g_affine": g_affine, "epilogue": (case.x, case.affine)}
        dx, partials = conv_dgrad(case.g, case.weight, size, stride=stride, **more, **options)
        return dx, partials.double().sum(0)
    return conv_wgrad(case.x, case.g, case.shape.kernel, stride=stride, prologue=prologue, g_affine=g_affine, **options), None


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Of the whole tensor: rounding errors are independent, so this is steady where a maximum is not."""
    return float((value.double() - truth).norm() / truth.norm())


def check(direction: str, shape: ConvShape, config: ConvTiles | None = None, transformed: bool = True) -> None:
    case = draw(shape, BF16)
    truth, _ = run(direction, draw(shape), "reference", transformed=transformed)
    ours, sums = run(direction, case, "fused", config, transformed)
    eager, _ = run(direction, case, "reference", transformed=transformed)
    # Two roundings to bfloat16, of an operand and of the result.
    floor = 2 * torch.finfo(BF16).eps / 2
    assert relative_error(ours, truth) <= max(2 * relative_error(eager, truth), floor), config
    if sums is not None:
        # Of the values as stored, so that only float32 sums lie between.
        terms = [ours.double()]
        if direction == "dgrad":
            mean, rstd = (vector.double().reshape(1, -1, 1, 1) for vector in (case.affine.mean, case.affine.rstd))
            terms.append(terms[0] * (case.x.double() - mean) * rstd)
        for found, term in zip(sums.reshape(len(terms), -1), terms, strict=True):
            allowed = 16 * torch.finfo(torch.float32).eps * (term.abs().sum((0, 2, 3)) + ours.double().abs().sum((0, 2, 3)))
            assert bool(((found - term.sum((0, 2, 3))).abs() <= allowed).all()), config


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", RESNET, ids=str)
def test_against_cudnn(shape, direction):
    check(direction, shape)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", [RESNET[1], RESNET[6], RESNET[8]], ids=str)
def test_every_candidate(shape, direction):
    for config in candidates(direction, shape, BF16, transformed=True):
        check(direction, shape, config)


@pytest.mark.parametrize("direction", ["forward", "dgrad"])
@pytest.mark.parametrize("shape", [RESNET[1], RESNET[4], RESNET[5], RESNET[7], RESNET[8]], ids=str)
def test_boxed_tiles(shape, direction):
    """Every candidate; one of them, with a split sum where there is one, in a graph too: descriptors are arguments of the launch."""
    boxed = [config for config in candidates(direction, shape, BF16, capability=torch.cuda.get_device_capability()) if config.boxed]
    if not boxed:
        pytest.skip("only for compute capability 9.0")
    for config in boxed:
        check(direction, shape, config, transformed=False)
    case, last = draw(shape, BF16), max(boxed, key=lambda config: config.split)
    expected, _ = run(direction, case, "fused", last, transformed=False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, _ = run(direction, case, "fused", last, transformed=False)
    captured.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, expected)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_same_bits_twenty_times(direction):
    case = draw(RESNET[2], BF16)
    first, sums = run(direction, case, "fused")
    for _ in range(20):
        again, sums_again = run(direction, case, "fused")
        assert torch.equal(first, again)
        assert sums is None or torch.equal(sums, sums_again)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_replay_of_a_graph(direction):
    case = draw(RESNET[1], BF16)
    expected, _ = run(direction, case, "fused")
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream):
        captured, _ = run(direction, case, "fused")
    captured.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, expected)


@pytest.mark.parametrize("stride", [1, 2])
def test_offsets_beyond_32_bits(stride):
    """Activations of 2.3e9 elements: the last rows equal those of a small image cut out of them."""
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    size, channels, last = 6000, 64, 8
    generator = torch.Generator("cuda").manual_seed(stride)
    x = torch.randn(1, size, size, channels, generator=generator, device="cuda", dtype=BF16).permute(0, 3, 1, 2)
    weight = torch.randn(64, channels, 3, 3, generator=generator, device="cuda").to(BF16).contiguous(memory_format=torch.channels_last)
    y, _ = conv_forward(x, weight, stride=stride, prologue=None, statistics=False, backend="fused")
    # A strip that begins at an even row, so that strides meet the same pixels; its first output row sees other padding.
    strip = x[:, :, -2 * last :].contiguous(memory_format=torch.channels_last)
    of_strip, _ = conv_forward(strip, weight, stride=stride, prologue=None, statistics=False, backend="fused")
    assert torch.equal(y[:, :, 1 - of_strip.shape[2] :], of_strip[:, :, 1:])

    dx, _ = conv_dgrad(y, weight, (size, size), stride=stride, g_affine=None, epilogue=None, backend="fused")
    g = y[:, :, -last:].clone(memory_format=torch.channels_last)
    of_strip, _ = conv_dgrad(g, weight, (last * stride, size), stride=stride, g_affine=None, epilogue=None, backend="fused")
    assert torch.equal(dx[:, :, -(last * stride - 2) :], of_strip[:, :, 2:])
    del dx

    # All of the gradient but the last rows is 0. Small whole numbers, whose sums are exact in whatever groups they are added.
    for tensor in (x, g):
        tensor.random_(-2, 3, generator=generator)
    only_last = torch.zeros_like(y)
    only_last[:, :, -last + 1 :] = g[:, :, 1:]
    dw = conv_wgrad(x, only_last, 3, stride=stride, backend="fused")
    g[:, :, 0] = 0
    of_strip = conv_wgrad(x[:, :, -last * stride :].contiguous(memory_format=torch.channels_last), g, 3, stride=stride, backend="fused")
    assert torch.equal(dw, of_strip)
